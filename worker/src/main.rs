//! The worker: arguments, parts, run.

use std::process::ExitCode;

use worker::cli::Cli;
use worker::slot::child;

fn main() -> ExitCode {
    // Before anything else: a slot's child has four milliseconds to start.
    if let Some(code) = child::main_if_slot() {
        return code;
    }
    common::process::harden();
    if let Err(error) = common::secrets::from_files() {
        return common::exit::fail(&error.into(), false);
    }
    let (cli, _) = common::cli::parse::<Cli>();
    cli.main()
}
