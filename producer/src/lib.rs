//! The producer: reads the feed, checks the cache, hands out what is to be digested, and follows
//! it to the end.

pub mod feed;

pub mod cache;

pub mod report;
