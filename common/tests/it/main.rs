//! What `common` does together with the world outside.

#![expect(
    clippy::unwrap_used,
    reason = "the helpers of tests fail like tests; .clippy.toml only reaches the tests themselves"
)]

mod broker;
mod fs_store;
mod git_server;
mod http_server;
mod rabbitmq;
mod raw_http;
mod s3_store;
