//! Logs, metrics, the HTTP server that exposes them, and traces.

pub mod logs;

pub mod registry;

pub mod http;

pub mod traces;
