//! The command line and its environment variables, as schedulers and compose files set them.

use std::io::Write;

use clap::builder::BoolishValueParser;
use clap::error::{ContextKind, ContextValue};
use clap::{Arg, ArgAction, Command, Error, Parser};

/// Most threads for blocking work, such as files and name lookups, of which hundreds may be asked for at
/// once: a container may allow few processes, and a thread that cannot start is a panic.
pub const BLOCKING_THREADS: usize = 48;

/// Parses this process's command line; ends the process with a message if it is invalid.
///
/// Unlike clap alone, it ignores empty environment variables, and takes `1`, `yes`, `on` and their
/// opposites as well as `true` and `false` for flags.
pub fn parse<P: Parser>() -> P {
    let command = lenient(P::command());
    let matches = command.clone().try_get_matches().unwrap_or_else(|error| {
        let variable = variable_of(&error, &command, std::env::args());
        // Not `exit`, which would print it first.
        let code = error.exit_code();
        error.print().ok();
        if let Some(variable) = variable {
            writeln!(
                std::io::stderr(),
                "\nThe value is that of the environment variable {variable}."
            )
            .ok();
        }
        std::process::exit(code)
    });
    P::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
}

/// Returns the environment variable that the invalid value came from, if it did: clap names only the
/// option.
fn variable_of(
    error: &Error,
    command: &Command,
    given: impl Iterator<Item = String>,
) -> Option<String> {
    let ContextValue::String(arg) = error.get(ContextKind::InvalidArg)? else {
        return None;
    };
    let option = arg.split([' ', '=']).next()?;
    let is_it = |given: String| given == option || given.starts_with(&format!("{option}="));
    if given.into_iter().any(is_it) {
        return None;
    }
    let name = option.strip_prefix("--")?;
    let mut levels = vec![command];
    while let Some(level) = levels.pop() {
        let found = level
            .get_arguments()
            .find(|arg| arg.get_long() == Some(name));
        let variable = found
            .and_then(Arg::get_env)
            .map(|name| name.to_string_lossy().into_owned());
        if variable
            .as_ref()
            .is_some_and(|name| std::env::var_os(name).is_some())
        {
            return variable;
        }
        levels.extend(level.get_subcommands());
    }
    None
}

fn lenient(command: Command) -> Command {
    command.mut_args(lenient_arg).mut_subcommands(lenient)
}

fn lenient_arg(arg: Arg) -> Arg {
    let Some(name) = arg.get_env() else {
        return arg;
    };
    if std::env::var_os(name).is_some_and(|value| value.is_empty()) {
        return arg.env(None::<&str>);
    }
    match arg.get_action() {
        ArgAction::SetTrue => arg.value_parser(BoolishValueParser::new()),
        _ => arg,
    }
}
