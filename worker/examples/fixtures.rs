//! Writes the parity fixtures as bare repositories: `fixtures DIR`. `DIR/fixtures.tsv` lists them,
//! and why an expected text is not gitingest's.

use std::fmt::Write;
use std::path::Path;

use anyhow::Context;

use fixtures::{Expected, OWNER, fixtures};

#[path = "../tests/it/parity/fixtures.rs"]
mod fixtures;

fn main() -> anyhow::Result<()> {
    let root = std::env::args().nth(1).context("no directory given")?;
    let root = Path::new(&root);
    let mut list = String::new();
    for fixture in fixtures() {
        fixture.build(root);
        let why = match fixture.expected {
            Expected::Gitingest => "",
            Expected::Decided(why) => why,
        };
        writeln!(list, "{OWNER}\t{}\t{why}", fixture.name)?;
    }
    std::fs::write(root.join("fixtures.tsv"), list)?;
    Ok(())
}
