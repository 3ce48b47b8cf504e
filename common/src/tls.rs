//! The cryptography of every TLS connection: ring's, for git hosts, feeds, broker and store alike.
//!
//! rustls' own choice, aws-lc, collects jitter of the CPU as entropy when a process first uses it.
//! Every slot is a process, and paid 31 ms for that: more than the rest of a small job. A variable
//! switches that off while aws-lc is built, but `cargo install` would not set it. ring asks the kernel
//! for random numbers, and spares a minute of C from the build.

use rustls::crypto::ring;

/// Makes ring this process's provider. Call it before a client of reqwest is built, which has no
/// provider of its own.
pub fn install_provider() {
    // Fails if there is one already: this one, installed before.
    ring::default_provider().install_default().ok();
}
