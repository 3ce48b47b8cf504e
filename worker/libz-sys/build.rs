//! Tells libgit2-sys where zlib's headers are.

fn main() {
    let root = std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR");
    println!("cargo:include={root}/include");
    println!("cargo:rerun-if-changed=include");
}
