//! README's table of options is what the programs say themselves.
//!
//! `REPOFLEET_BLESS=1 deploy/test.sh -p producer readme` writes it anew.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use clap::{Arg, Command, CommandFactory};

const BEGIN: &str = "<!-- options: written by producer/tests/it/readme.rs -->\n";
const END: &str = "<!-- end of options -->\n";

/// What the commands about dead letters have in common, they all have.
const ALL_DEAD: &str =
    "producer dead list, producer dead show, producer dead replay, producer dead purge";

/// What is said of an option, by what it is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Row {
    option: String,
    variable: String,
    default: String,
    what: String,
}

fn row(arg: &Arg) -> Option<Row> {
    let long = arg.get_long()?;
    if arg.is_hide_set() || ["help", "version"].contains(&long) {
        return None;
    }
    let takes_value = arg.get_action().takes_values();
    let value = arg
        .get_value_names()
        .filter(|_| takes_value)
        .map_or_else(String::new, |names| format!(" {}", names[0]));
    let defaults: Vec<_> = arg
        .get_default_values()
        .iter()
        .filter(|_| takes_value)
        .map(|value| format!("`{}`", value.to_string_lossy()))
        .collect();
    let code = |text: &str| match text {
        "" => String::new(),
        text => format!("`{text}`"),
    };
    let help = arg.get_help().map_or_else(String::new, ToString::to_string);
    Some(Row {
        option: code(&format!("--{long}{value}")).replace('|', "\\|"),
        variable: arg
            .get_env()
            .map_or_else(String::new, |name| code(&name.to_string_lossy())),
        default: defaults.join(", "),
        what: help.replace('|', "\\|").replace('<', "\\<"),
    })
}

/// Every option of a command and those below it, with the commands that have it.
fn collect(command: &Command, name: &str, rows: &mut BTreeMap<Row, Vec<String>>) {
    for arg in command.get_arguments() {
        if let Some(row) = row(arg) {
            rows.entry(row).or_default().push(name.to_owned());
        }
    }
    for sub in command.get_subcommands() {
        if sub.get_name() != "help" {
            collect(sub, &format!("{name} {}", sub.get_name()), rows);
        }
    }
}

fn table() -> String {
    let mut rows = BTreeMap::new();
    collect(&producer::cli::Cli::command(), "producer", &mut rows);
    collect(&worker::cli::Cli::command(), "worker", &mut rows);
    let mut table =
        String::from("| option | variable | default | of | what |\n|---|---|---|---|---|\n");
    for (row, commands) in rows {
        let Row {
            option,
            variable,
            default,
            what,
        } = row;
        let commands = commands.join(", ").replace(ALL_DEAD, "producer dead");
        table.push_str(&format!(
            "| {option} | {variable} | {default} | {commands} | {what} |\n"
        ));
    }
    table
}

#[test]
fn readme_lists_every_option() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md");
    let readme = fs::read_to_string(&path).unwrap();
    let (before, rest) = readme
        .split_once(BEGIN)
        .expect("README has the table's beginning");
    let (listed, after) = rest.split_once(END).expect("README has the table's end");
    let table = table();
    if std::env::var_os("REPOFLEET_BLESS").is_some() {
        fs::write(&path, format!("{before}{BEGIN}{table}{END}{after}")).unwrap();
        return;
    }
    assert_eq!(
        listed, table,
        "README's options are not the programs': REPOFLEET_BLESS=1 deploy/test.sh -p producer readme"
    );
}
