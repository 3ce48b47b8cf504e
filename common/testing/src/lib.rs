//! What the tests of every member share: contract suites, servers with faults, odd repositories.

pub mod broker_contract;

pub mod store_contract;

pub mod git_server;

pub mod http_server;

pub mod collector;

pub mod s3_server;

pub mod seaweedfs;

pub mod repositories;

pub mod packs;

pub mod seeds;

pub mod root;

pub mod small_disk;

pub mod kernel;

pub mod rabbitmq;

pub mod tcp_proxy;
