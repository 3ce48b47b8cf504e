//! Logs, metrics, and the HTTP server that exposes them.

pub mod logs;

pub mod registry;

pub mod http;
