//! The producer's modules against real files and real sockets.

mod cache;
mod feed;
mod logs;
