//! The fuzzer's seeds, and inputs that once broke something, as ordinary tests.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

/// Runs `target` on each file in the folder `common/testing/fuzz/seeds/{name}`.
///
/// # Panics
/// If `target` panics, with the file's name, or if there are no seeds.
pub fn replay(name: &str, target: impl Fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/seeds")
        .join(name);
    let seeds =
        fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let seeds: Vec<PathBuf> = seeds.flatten().map(|seed| seed.path()).collect();
    assert!(!seeds.is_empty(), "no seeds in {}", folder.display());
    for seed in seeds {
        let input = fs::read(&seed).expect("a seed can be read");
        // Says which one it was.
        let result = catch_unwind(AssertUnwindSafe(|| target(&input)));
        assert!(result.is_ok(), "the seed {} fails", seed.display());
    }
}
