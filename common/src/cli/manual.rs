//! What is made of a program's command line: completions for shells, pages for `man`, help in order.

use std::io;
use std::path::PathBuf;

use clap::{Args, Command, CommandFactory};
use clap_complete::Shell;

use crate::exit::{self, ExitError};
use crate::job::{DIGEST_FORMAT, WIRE_VERSION};

/// clap prints examples last; most people look for them first.
const EXAMPLES_FIRST: &str =
    "{about-with-newline}\n{usage-heading} {usage}\n\n{before-help}{all-args}{after-help}";

/// Prints completions for a shell.
#[derive(Args, Debug)]
pub struct CompletionsCommand {
    /// The shell
    shell: Shell,
}

/// Writes pages for `man` into a folder.
#[derive(Args, Debug)]
pub struct ManCommand {
    /// The folder, such as ~/.local/share/man/man1
    folder: PathBuf,
}

impl CompletionsCommand {
    /// Prints them for the program whose command line `P` is.
    pub fn run<P: CommandFactory>(&self) -> u8 {
        let mut command = P::command();
        let name = command.get_name().to_owned();
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut command, name, &mut script);
        // Whoever reads it may have had enough.
        io::Write::write_all(&mut io::stdout(), &script).ok();
        exit::OK
    }
}

impl ManCommand {
    /// Writes a page for the program whose command line `P` is, and one for each of its commands.
    ///
    /// # Errors
    /// If the folder cannot be written to.
    pub fn run<P: CommandFactory>(&self) -> Result<u8, ExitError> {
        let folder = &self.folder;
        let written = std::fs::create_dir_all(folder)
            .and_then(|()| clap_mangen::generate_to(without_defaults(P::command()), folder));
        written.map_err(|error| {
            let message = format!("cannot write to {}: {error}", folder.display());
            ExitError::new(exit::UNAVAILABLE, message)
        })?;
        Ok(exit::OK)
    }
}

/// A page must not tell what the environment happens to be.
fn without_defaults(command: Command) -> Command {
    command
        .mut_args(|arg| arg.hide_env_values(true))
        .mut_subcommands(without_defaults)
}

/// Moves the examples at the end of each command's help before its options, in the short help as well.
pub(super) fn examples_first(command: Command) -> Command {
    let command = command.mut_subcommands(examples_first);
    let Some(after) = command.get_after_long_help().map(ToString::to_string) else {
        return command;
    };
    if !after.starts_with("Example") {
        return command;
    }
    let (examples, rest) = after.split_once("\n\n").unwrap_or((&after, ""));
    command
        .help_template(EXAMPLES_FIRST)
        .before_help(examples.to_owned())
        .after_long_help(rest.to_owned())
}

/// Returns what `--version` says beyond the number: the commit it was built from, if the build said,
/// and the formats that it reads and writes.
pub(super) fn long_version(number: &str) -> String {
    let commit = option_env!("REPOFLEET_COMMIT").unwrap_or("not known");
    format!(
        "{number}\ncommit:         {commit}\ndigest format:  {DIGEST_FORMAT}\nmessage format: {WIRE_VERSION}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn examples_come_before_the_options() {
        let command = Command::new("x").subcommand(
            Command::new("run")
                .about("Runs")
                .after_long_help("Examples:\n  x run\n\nExit codes:\n  0 done"),
        );
        let mut command = examples_first(command);
        let run = command.find_subcommand_mut("run").unwrap();
        let long = run.render_long_help().to_string();
        let places = [
            "Runs",
            "Usage:",
            "Examples:\n  x run",
            "Options:",
            "Exit codes:",
        ];
        let found = places.map(|text| long.find(text).unwrap_or_else(|| panic!("{text}: {long}")));
        assert!(found.is_sorted(), "{long}");
        let short = run.render_help().to_string();
        assert!(
            short.contains("Examples:") && !short.contains("Exit codes"),
            "{short}"
        );
    }
}
