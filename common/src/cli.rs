//! The command line and its environment variables, read as a scheduler or a compose file sets them.

use std::io::Write;

use clap::builder::BoolishValueParser;
use clap::error::{ContextKind, ContextValue};
use clap::{Arg, ArgAction, Command, Error, Parser};

/// Reads this process's command line; ends it with a message where that is wrong.
///
/// An environment variable that is empty counts as not set, and a flag's may be `1`, `yes` or `on`
/// as well as `true`, and their opposites. clap itself takes an empty one as a value, and knows
/// `true` and `false` only.
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

/// The environment variable that the value came from which `error` is about, if it came from one: clap names only
/// the option, which nobody gave.
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
