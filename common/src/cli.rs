//! The command line and its environment variables, as schedulers and compose files set them.

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};

use clap::builder::BoolishValueParser;
use clap::error::{ContextKind, ContextValue};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command, Error, Parser};

use self::file::{Settings, is_typed};
use crate::exit;
use crate::text::unsubstituted;

pub mod file;

pub mod manual;

/// Most threads for blocking work, such as files and name lookups, of which hundreds may be asked for at
/// once: a container may allow few processes, and a thread that cannot start is a panic.
pub const BLOCKING_THREADS: usize = 48;

/// An option as it is in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// Its name, without dashes.
    pub name: String,
    /// Its values, as they were written; `None` if they are secret.
    pub values: Option<Vec<String>>,
    /// Whether it takes several.
    pub is_list: bool,
    /// Where they come from.
    pub origin: Origin,
}

/// Where an option's value comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The command line.
    Flag,
    /// This environment variable.
    Variable(String),
    /// This file, of `--config`.
    File(PathBuf),
    /// Nothing was given.
    Default,
}

/// Parses this process's command line; ends the process with a message if it is invalid. Returns the
/// options in force as well.
///
/// Unlike clap alone, it reads the file of `--config`, ignores empty environment variables, refuses
/// a literal `${…}` in one, and takes `1`, `yes`, `on` and their opposites as well as `true` and
/// `false` for flags.
pub fn parse<P: Parser>() -> (P, Vec<Setting>) {
    let complete = complete(P::command());
    let command = lenient(complete.clone());
    let arguments: Vec<_> = std::env::args_os().collect();
    let file = literals(&command).map_or_else(|| Settings::named(&arguments, &command), Err);
    let (path, settings) = file.unwrap_or_else(|why| {
        writeln!(std::io::stderr(), "error: {why}").ok();
        std::process::exit(exit::USAGE.into())
    });
    let (arguments, of_file) = settings.added_to(&arguments, &command);
    let parsed = command.clone().try_get_matches_from(&arguments);
    let matches = parsed.unwrap_or_else(|mut error| {
        let origin = origin_of(&error, &command, &arguments, &of_file, path.as_deref());
        hide_secret(&mut error, &command);
        // Not `exit`, which would print it first.
        let code = error.exit_code();
        error.print().ok();
        if let Some(origin) = origin {
            writeln!(std::io::stderr(), "\nThe value comes from {origin}.").ok();
        }
        std::process::exit(code)
    });
    let in_force = in_force(&complete, &matches, &of_file, path.as_deref());
    let parsed = P::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    (parsed, in_force)
}

/// Returns the command line as its help shows it.
fn complete(command: Command) -> Command {
    let number = command.get_version().unwrap_or_default().to_owned();
    manual::examples_first(command).long_version(manual::long_version(&number))
}

/// Says which variable holds a `${…}` that nobody substituted, if one does.
fn literals(command: &Command) -> Option<String> {
    let own = command.get_arguments().filter_map(|arg| {
        let name = arg.get_env()?.to_string_lossy();
        unsubstituted(&name, &std::env::var(&*name).ok()?)
    });
    let tokens = std::env::var("GITHUB_TOKEN").ok();
    let tokens = tokens.and_then(|token| unsubstituted("GITHUB_TOKEN", &token));
    let mut found = own
        .chain(tokens)
        .chain(command.get_subcommands().filter_map(literals));
    found.next()
}

/// Lists the options of the command that was given, with their values.
fn in_force(
    command: &Command,
    matches: &ArgMatches,
    of_file: &[String],
    path: Option<&Path>,
) -> Vec<Setting> {
    let mut options: Vec<_> = command.get_arguments().collect();
    let (mut command, mut matches) = (command, matches);
    while let Some((name, deeper)) = matches.subcommand()
        && let Some(subcommand) = command.find_subcommand(name)
    {
        (command, matches) = (subcommand, deeper);
        options.extend(command.get_arguments());
    }
    let setting = |arg: &&Arg| {
        let (id, name) = (arg.get_id().as_str(), arg.get_long()?);
        let variable = arg.get_env()?.to_string_lossy().into_owned();
        let values = match arg.get_action() {
            ArgAction::SetTrue => vec![matches.get_flag(id).to_string()],
            _ => {
                let values = matches.get_raw(id).into_iter().flatten();
                values
                    .map(|value| value.to_string_lossy().into_owned())
                    .collect()
            }
        };
        let origin = match matches.value_source(id) {
            Some(ValueSource::CommandLine) => match path {
                Some(path) if of_file.iter().any(|given| given == name) => {
                    Origin::File(path.to_owned())
                }
                _ => Origin::Flag,
            },
            Some(ValueSource::EnvVariable) => Origin::Variable(variable),
            _ => Origin::Default,
        };
        Some(Setting {
            name: name.to_owned(),
            values: (!arg.is_hide_env_values_set() || is_shown_in_part(name)).then_some(values),
            is_list: matches!(arg.get_action(), ArgAction::Append),
            origin,
        })
    };
    options.iter().filter_map(setting).collect()
}

/// Whether only a part of an option's value may be secret, which can be left out.
fn is_shown_in_part(name: &str) -> bool {
    ["feed", "cache-url"].contains(&name)
}

/// Says where the invalid value came from, unless it was typed: clap names only the option.
fn origin_of(
    error: &Error,
    command: &Command,
    arguments: &[OsString],
    of_file: &[String],
    path: Option<&Path>,
) -> Option<String> {
    let option = invalid_option(error)?;
    match path {
        Some(path) if of_file.contains(&option) => Some(format!("{option} in {}", path.display())),
        _ => variable_of(&option, command, arguments)
            .map(|variable| format!("the environment variable {variable}")),
    }
}

/// Returns the option that clap found invalid, without dashes.
fn invalid_option(error: &Error) -> Option<String> {
    let ContextValue::String(arg) = error.get(ContextKind::InvalidArg)? else {
        return None;
    };
    let option = arg.split([' ', '=']).next()?.strip_prefix("--")?;
    Some(option.to_owned())
}

/// Keeps the value of an option that may hold a secret out of the message.
fn hide_secret(error: &mut Error, command: &Command) {
    let Some(option) = invalid_option(error) else {
        return;
    };
    let is_hidden = |arg: &&Arg| arg.is_hide_env_values_set();
    if error.get(ContextKind::InvalidValue).is_some()
        && options(command, &option).iter().any(is_hidden)
    {
        let hidden = ContextValue::String("(not shown)".to_owned());
        error.insert(ContextKind::InvalidValue, hidden);
    }
}

/// The options of this name, of all commands.
fn options<'a>(command: &'a Command, name: &str) -> Vec<&'a Arg> {
    let own = command.get_arguments();
    let own = own.filter(|arg| arg.get_long() == Some(name));
    let others = command
        .get_subcommands()
        .flat_map(|command| options(command, name));
    own.chain(others).collect()
}

/// Returns the environment variable that the invalid value of `option` came from, if it did.
fn variable_of(option: &str, command: &Command, arguments: &[OsString]) -> Option<String> {
    if is_typed(option, arguments) {
        return None;
    }
    let variables = options(command, option)
        .into_iter()
        .filter_map(Arg::get_env);
    let mut variables = variables.filter(|name| std::env::var_os(name).is_some());
    variables
        .next()
        .map(|name| name.to_string_lossy().into_owned())
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
