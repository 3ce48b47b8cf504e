//! Options from a TOML file: what `--config` names.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use clap::{Arg, ArgAction, Args, Command};
use toml::{Table, Value};

use crate::text::unsubstituted;

/// Where options are read from, beside the command line and the environment.
#[derive(Args, Clone, Debug)]
pub struct FileConfig {
    /// Read options from this TOML file: their names without the dashes, such as `timeout = "5m"`. A
    /// flag takes precedence over a variable, a variable over the file
    #[arg(long, global = true, env = "CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// Names of the programs, of which each may have a table in the file.
const PROGRAMS: [&str; 2] = ["producer", "worker"];
/// How alike a name must be to be suggested, from 0 to 1.
const ALIKE: f64 = 0.8;

/// The options in a file.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Settings(BTreeMap<String, Vec<String>>);

impl Settings {
    /// Reads the file that the command line or the environment names, if either does.
    pub(super) fn named(
        arguments: &[OsString],
        command: &Command,
    ) -> Result<(Option<PathBuf>, Self), String> {
        let path = value_of("--config", arguments).or_else(from_environment);
        let Some(path) = path.filter(|_| !is_about_itself(arguments)) else {
            return Ok((None, Self::default()));
        };
        let path = PathBuf::from(path);
        let settings = Self::read(&path, command)
            .map_err(|why| format!("the settings in {}: {why}", path.display()))?;
        Ok((Some(path), settings))
    }

    fn read(path: &Path, command: &Command) -> Result<Self, String> {
        let text = fs::read_to_string(path)
            .map_err(|error| format!("{error}; check --config, or the variable CONFIG"))?;
        Self::parse(&text, command)
    }

    fn parse(text: &str, command: &Command) -> Result<Self, String> {
        // Its own message repeats the line, in which a password may be.
        let table: Table = toml::from_str(text).map_err(|error| {
            let before = error.span().map_or("", |span| &text[..span.start]);
            let line = before.matches('\n').count() + 1;
            format!("line {line} is not TOML: {}", error.message())
        })?;
        let known = known(command);
        let (tables, everywhere): (Vec<_>, Vec<_>) = table
            .into_iter()
            .partition(|(name, value)| value.is_table() && PROGRAMS.contains(&name.as_str()));
        let own = tables
            .into_iter()
            .filter(|(name, _)| name == command.get_name());
        let own = own.filter_map(|(_, value)| match value {
            Value::Table(own) => Some(own),
            _ => None,
        });
        let mut settings = BTreeMap::new();
        for (name, value) in everywhere.into_iter().chain(own.flatten()) {
            let name = name.replace('_', "-");
            let Some(arg) = known.get(name.as_str()) else {
                return Err(unknown(&name, known.keys(), command.get_name()));
            };
            let mut values = values(&name, value)?;
            if matches!(arg.get_action(), ArgAction::SetTrue) {
                values = vec![is_true(&name, &values)?.to_string()];
            }
            if values.len() > 1 && !matches!(arg.get_action(), ArgAction::Append) {
                return Err(format!("{name} takes one value, not a list"));
            }
            settings.insert(name, values);
        }
        Ok(Self(settings))
    }

    /// Returns the arguments with those of the file that neither they nor the environment give, and
    /// the names of these.
    pub(super) fn added_to(
        &self,
        arguments: &[OsString],
        command: &Command,
    ) -> (Vec<OsString>, Vec<String>) {
        let (mut all, mut added) = (Vec::new(), Vec::new());
        let levels = levels(arguments, command);
        for (at, argument) in arguments.iter().enumerate() {
            all.push(argument.clone());
            let Some((_, level)) = levels.iter().find(|(place, _)| *place == at) else {
                continue;
            };
            for arg in level.get_arguments() {
                let Some((name, values)) = arg.get_long().and_then(|l| self.0.get_key_value(l))
                else {
                    continue;
                };
                if is_given(arg, name, arguments) || added.contains(name) {
                    continue;
                }
                added.push(name.clone());
                all.extend(values.iter().filter_map(|value| match arg.get_action() {
                    ArgAction::SetTrue => {
                        (value == "true").then(|| OsString::from(format!("--{name}")))
                    }
                    _ => Some(OsString::from(format!("--{name}={value}"))),
                }));
            }
        }
        (all, added)
    }
}

/// Whether the command is about the program itself, and needs no options.
fn is_about_itself(arguments: &[OsString]) -> bool {
    let asks = ["-h", "--help", "-V", "--version"];
    let commands = ["help", "completions", "man"];
    arguments
        .iter()
        .any(|argument| asks.iter().any(|ask| argument == ask))
        || arguments
            .get(1)
            .is_some_and(|first| commands.iter().any(|command| first == command))
}

/// Reads whether a flag is on, as from the environment.
fn is_true(name: &str, values: &[String]) -> Result<bool, String> {
    match values
        .iter()
        .map(|value| value.to_ascii_lowercase())
        .next()
        .as_deref()
    {
        Some("true" | "yes" | "on" | "1" | "y" | "t") => Ok(true),
        Some("false" | "no" | "off" | "0" | "n" | "f") => Ok(false),
        _ => Err(format!("{name} takes true or false")),
    }
}

fn from_environment() -> Option<OsString> {
    std::env::var_os("CONFIG").filter(|path| !path.is_empty())
}

/// The value of an option among arguments.
fn value_of(option: &str, arguments: &[OsString]) -> Option<OsString> {
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        let text = argument.to_string_lossy();
        if text == option {
            return arguments.next().cloned();
        }
        if let Some(value) = text.strip_prefix(option).and_then(|v| v.strip_prefix('=')) {
            return Some(value.to_owned().into());
        }
    }
    None
}

fn is_given(arg: &Arg, name: &str, arguments: &[OsString]) -> bool {
    let variable = arg.get_env().and_then(std::env::var_os);
    variable.is_some_and(|value| !value.is_empty()) || is_typed(name, arguments)
}

/// Whether the option `name` is among arguments.
pub(super) fn is_typed(name: &str, arguments: &[OsString]) -> bool {
    arguments.iter().any(|argument| {
        let argument = argument.to_string_lossy();
        let rest = argument
            .strip_prefix("--")
            .and_then(|a| a.strip_prefix(name));
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('='))
    })
}

/// The command and each of its subcommands that the arguments name, and at which place.
fn levels<'a>(arguments: &[OsString], command: &'a Command) -> Vec<(usize, &'a Command)> {
    let mut levels = vec![(0, command)];
    let mut level = command;
    let mut is_value = false;
    for (place, argument) in arguments.iter().enumerate().skip(1) {
        let text = argument.to_string_lossy();
        if std::mem::take(&mut is_value) {
            continue;
        }
        if let Some(subcommand) = level.find_subcommand(&*text) {
            level = subcommand;
            levels.push((place, level));
        }
        let option = text.strip_prefix("--").unwrap_or_default();
        let takes_value =
            |arg: &Arg| arg.get_long() == Some(option) && arg.get_action().takes_values();
        is_value = levels
            .iter()
            .any(|(_, level)| level.get_arguments().any(takes_value));
    }
    levels
}

/// The options that may be in a file: those that may be in the environment.
fn known(command: &Command) -> BTreeMap<&str, &Arg> {
    let own = command.get_arguments();
    let own = own.filter(|arg| arg.get_env().is_some() && arg.get_long() != Some("config"));
    let own = own.filter_map(|arg| Some((arg.get_long()?, arg)));
    let others = command.get_subcommands().flat_map(known);
    own.chain(others).collect()
}

fn unknown<'a>(name: &str, known: impl Iterator<Item = &'a &'a str>, program: &str) -> String {
    let likeness = |other: &&str| strsim::jaro_winkler(name, other);
    let nearest = known
        .copied()
        .max_by(|a, b| likeness(a).total_cmp(&likeness(b)))
        .filter(|nearest| likeness(nearest) >= ALIKE);
    let hint = match nearest {
        Some(nearest) => format!("did you mean {nearest}?"),
        None => format!("`{program} run --help` lists them"),
    };
    let other = PROGRAMS.iter().find(|other| **other != program);
    let other = other.copied().unwrap_or_default();
    format!(
        "{program} has no option {name:?}; {hint} (what is only for the {other} belongs in a table [{other}])"
    )
}

fn values(name: &str, value: Value) -> Result<Vec<String>, String> {
    let values = match value {
        Value::Array(values) => values,
        value => vec![value],
    };
    let values = values.into_iter().map(|value| match value {
        Value::String(text) => match unsubstituted(name, &text) {
            Some(why) => Err(why),
            None => Ok(text),
        },
        Value::Integer(number) => Ok(number.to_string()),
        Value::Float(number) => Ok(number.to_string()),
        Value::Boolean(is) => Ok(is.to_string()),
        Value::Datetime(_) | Value::Array(_) | Value::Table(_) => Err(format!(
            "{name} takes a text, a number, true or false, or a list of these"
        )),
    });
    values.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command() -> Command {
        let option = |name: &'static str| Arg::new(name).long(name).env(format!("NO_{name}"));
        Command::new("producer")
            .arg(option("log").global(true))
            .arg(Arg::new("config").long("config").env("NO_CONFIG"))
            .subcommand(
                Command::new("run")
                    .arg(option("timeout"))
                    .arg(option("only").action(ArgAction::Append))
                    .arg(option("force").action(ArgAction::SetTrue))
                    .arg(option("dry-run").action(ArgAction::SetTrue))
                    .arg(Arg::new("typed").long("typed")),
            )
            .subcommand(Command::new("dead").subcommand(Command::new("list").arg(option("owner"))))
    }

    fn added(file: &str, line: &str) -> String {
        let settings = Settings::parse(file, &command()).unwrap();
        let arguments: Vec<_> = line.split(' ').map(OsString::from).collect();
        let (all, _) = settings.added_to(&arguments, &command());
        all.join(" ".as_ref()).into_string().unwrap()
    }

    #[test]
    fn what_is_not_given_comes_from_the_file() {
        let file = "log = 'json'\ntimeout = 5\nonly = ['a/*', 'b/*']\nforce = 1\ndry_run = 'off'\n\
                    owner = 'x'\n[worker]\nwhatever = 1\n[producer]\nlog = 'human'\n";
        for (line, expected) in [
            (
                "producer run",
                "producer --log=human run --timeout=5 --only=a/* --only=b/* --force",
            ),
            (
                "producer --log auto run --timeout 1 --only=c",
                "producer --log auto run --force --timeout 1 --only=c",
            ),
            (
                "producer dead list",
                "producer --log=human dead list --owner=x",
            ),
            // A value that is called like a command.
            ("producer --log run", "producer --log run"),
        ] {
            assert_eq!(added(file, line), expected);
        }
    }

    #[test]
    fn what_is_about_the_program_needs_no_file() {
        for (line, expected) in [
            ("producer help run", true),
            ("producer run --help", true),
            ("producer -V", true),
            ("producer completions bash", true),
            ("producer run --log man", false),
        ] {
            let arguments: Vec<_> = line.split(' ').map(OsString::from).collect();
            assert_eq!(is_about_itself(&arguments), expected, "{line}");
        }
    }

    #[test]
    fn what_is_wrong_in_a_file_is_said() {
        for (file, why) in [
            ("timeot = 5", "did you mean timeout?"),
            ("zzz = 5", "`producer run --help` lists them"),
            ("typed = 5", "producer has no option \"typed\""),
            ("config = 'x'", "producer has no option \"config\""),
            ("[run]\ntimeout = 5", "producer has no option \"run\""),
            ("timeout = [1, 2]", "timeout takes one value"),
            ("timeout = 2026-01-01", "timeout takes a text"),
            ("force = \"perhaps\"", "force takes true or false"),
            ("only = [[1]]", "only takes a text"),
            ("timeout = '${T}'", "timeout is a literal ${…}"),
            ("\ntimeout = s3cret", "line 2 is not TOML"),
        ] {
            let said = Settings::parse(file, &command()).unwrap_err();
            assert!(said.contains(why), "{file}: {said}");
            assert!(!said.contains("s3cret"), "{said}");
        }
    }
}
