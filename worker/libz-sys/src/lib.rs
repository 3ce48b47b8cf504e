//! zlib's C interface, exported by zlib-rs under zlib's own names.
//!
//! `include/zlib.h` and `include/zconf.h` are zlib's own, under zlib's licence, which they carry.

pub use libz_rs_sys::*;
