//! Takes a job, fetches and digests its repository in a slot, stores the digest.

pub mod source;

pub mod fetch;

pub mod digest;
