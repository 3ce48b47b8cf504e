//! The command line and its environment variables, read as a scheduler or a compose file sets them.

use clap::builder::BoolishValueParser;
use clap::{Arg, ArgAction, Command, Parser};

/// Reads this process's command line; ends it with a message where that is wrong.
///
/// An environment variable that is empty counts as not set, and a flag's may be `1`, `yes` or `on`
/// as well as `true`, and their opposites. clap itself takes an empty one as a value, and knows
/// `true` and `false` only.
pub fn parse<P: Parser>() -> P {
    let matches = lenient(P::command()).get_matches();
    P::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
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
