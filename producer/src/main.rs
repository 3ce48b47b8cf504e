//! The producer: arguments, parts, run.

use std::process::ExitCode;

use producer::cli::Cli;
use worker::slot::child;

fn main() -> ExitCode {
    // A worker in this process starts its slots from this binary.
    if let Some(code) = child::main_if_slot() {
        return code;
    }
    common::process::harden();
    if let Err(error) = common::secrets::from_files() {
        return common::exit::fail(&error.into(), false);
    }
    let (cli, settings) = common::cli::parse::<Cli>();
    cli.main(&settings)
}
