//! README's tables of options and metrics are what the programs say themselves.
//!
//! `REPOFLEET_BLESS=1 deploy/test.sh -p producer readme -- --test-threads 1` writes them anew.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use clap::{Arg, Command, CommandFactory};
use common::telemetry::fleet::FleetMetrics;
use common::telemetry::{Expose, Metrics};

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

fn in_checkout(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

/// README's part of this name is `table`, or is made so.
fn hold(name: &str, table: &str) {
    let (begin, end) = (
        format!("<!-- {name}: written by producer/tests/it/readme.rs -->\n"),
        format!("<!-- end of {name} -->\n"),
    );
    let path = in_checkout("README.md");
    let readme = fs::read_to_string(&path).unwrap();
    let (before, rest) = readme
        .split_once(&begin)
        .expect("README has the table's beginning");
    let (listed, after) = rest.split_once(&end).expect("README has the table's end");
    if std::env::var_os("REPOFLEET_BLESS").is_some() {
        fs::write(&path, format!("{before}{begin}{table}{end}{after}")).unwrap();
        return;
    }
    assert_eq!(
        listed, table,
        "README's {name} are not the programs': REPOFLEET_BLESS=1 deploy/test.sh -p producer readme -- --test-threads 1"
    );
}

#[test]
fn readme_lists_every_option() {
    hold("options", &table());
}

/// What `/metrics` says of a metric.
#[derive(Debug, Default)]
struct Metric {
    kind: String,
    labels: BTreeSet<String>,
    what: String,
    of: Vec<&'static str>,
}

/// Every metric by its name.
fn metrics() -> BTreeMap<String, Metric> {
    let mut metrics: BTreeMap<String, Metric> = BTreeMap::new();
    for (of, text) in [
        ("`worker run`, `producer run`", Metrics::new().render()),
        ("`producer observe`", FleetMetrics::new().render()),
    ] {
        let text = String::from_utf8(text).unwrap();
        let mut name = String::new();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (metric, what) = rest.split_once(' ').unwrap();
                metric.clone_into(&mut name);
                let metric = metrics.entry(name.clone()).or_default();
                metric.what = what.replace('|', "\\|");
                metric.of.push(of);
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (_, kind) = rest.split_once(' ').unwrap();
                kind.clone_into(&mut metrics.get_mut(&name).unwrap().kind);
            } else if let Some((_, rest)) = line.split_once('{') {
                let labels = rest.split(',').filter_map(|label| label.split_once("=\""));
                let labels = labels.map(|(label, _)| label.to_owned());
                let labels = labels.filter(|label| label != "le");
                metrics.get_mut(&name).unwrap().labels.extend(labels);
            }
        }
    }
    metrics
}

#[test]
fn readme_lists_every_metric() {
    let mut table = String::from("| metric | kind | labels | of | what |\n|---|---|---|---|---|\n");
    for (name, metric) in metrics() {
        let labels: Vec<_> = metric.labels.iter().map(|l| format!("`{l}`")).collect();
        let of = match metric.of[..] {
            [of] => of,
            _ => "all",
        };
        table.push_str(&format!(
            "| `{name}` | {} | {} | {of} | {} |\n",
            metric.kind,
            labels.join(", "),
            metric.what
        ));
    }
    hold("metrics", &table);
}

/// A metric that was renamed makes an alert silent, and a graph empty: nobody would notice.
#[test]
fn alerts_and_dashboard_ask_for_metrics_that_there_are() {
    let metrics = metrics();
    for path in [
        "deploy/prometheus/alerts.yml",
        "deploy/prometheus/alerts_test.yml",
        "deploy/grafana/dashboard.json",
    ] {
        let text = fs::read_to_string(in_checkout(path)).unwrap();
        let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let ours =
            words.filter(|word| word.starts_with("repofleet_") || word.starts_with("process_"));
        let mut asked = 0;
        for word in ours {
            let of_histogram = ["_bucket", "_sum", "_count"]
                .iter()
                .filter_map(|end| word.strip_suffix(end))
                .any(|name| metrics.get(name).is_some_and(|m| m.kind == "histogram"));
            assert!(
                of_histogram || metrics.contains_key(word),
                "{path} asks for {word}, which nobody shows"
            );
            asked += 1;
        }
        assert!(asked > 10, "{path} asks for {asked} metrics");
    }
}

/// Else somebody would build one version, and run another.
#[test]
fn images_are_named_by_this_version() {
    for path in [
        "compose.yaml",
        "deploy/Dockerfile",
        "deploy/kubernetes/base/kustomization.yaml",
        "deploy/kubernetes/overlays/try/kustomization.yaml",
        "README.md",
    ] {
        let text = fs::read_to_string(in_checkout(path)).unwrap();
        let named = text.lines().filter_map(|line| {
            let tag = line.split_once("newTag: ");
            let image = || line.split_once("repofleet/worker:");
            Some(tag.or_else(image)?.1)
        });
        let mut seen = 0;
        for version in named {
            assert!(
                version.starts_with(env!("CARGO_PKG_VERSION")),
                "{path}: {version}"
            );
            seen += 1;
        }
        assert!(seen > 0, "{path} names no image");
    }
}
