//! The manuals say what the programs say: options, metrics, exit codes, alerts, commands, links.
//!
//! `REPOFLEET_BLESS=1 deploy/test.sh -p producer readme` writes the generated tables.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use clap::{Arg, Command, CommandFactory};
use common::telemetry::registry::Expose;
use producer::observe::metrics::FleetMetrics;
use worker::metrics::Metrics;

const PRODUCER: &str = "producer/README.md";
const WORKER: &str = "worker/README.md";
const ALERTS: &str = "deploy/prometheus/README.md";

fn in_checkout(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

fn read(path: &str) -> String {
    fs::read_to_string(in_checkout(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Every Markdown file of the checkout, by its path from the top.
fn manuals() -> BTreeMap<String, String> {
    let top = in_checkout("");
    let mut folders = vec![PathBuf::new()];
    let mut manuals = BTreeMap::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(top.join(&folder)).unwrap() {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            let path = folder.join(&name);
            if entry.file_type().unwrap().is_dir() {
                if !name.starts_with('.') && !["target", "digests"].contains(&&*name) {
                    folders.push(path);
                }
            } else if name.ends_with(".md") {
                let path = path.to_str().unwrap();
                manuals.insert(path.to_owned(), read(path));
            }
        }
    }
    manuals
}

/// Asserts that the generated part `name` of a manual is `table`, or writes it.
fn check_table(manual: &str, name: &str, table: &str) {
    // Two tests must not write one file at the same time.
    static WRITING: Mutex<()> = Mutex::new(());
    let _writing = WRITING.lock().unwrap_or_else(PoisonError::into_inner);
    let begin = format!("<!-- {name}: written by producer/tests/it/readme.rs -->\n");
    let end = format!("<!-- end of {name} -->\n");
    let text = read(manual);
    let (before, rest) = text.split_once(&begin).expect("the table's beginning");
    let (listed, after) = rest.split_once(&end).expect("the table's end");
    if std::env::var_os("REPOFLEET_BLESS").is_some() {
        let text = format!("{before}{begin}{table}{end}{after}");
        fs::write(in_checkout(manual), text).unwrap();
        return;
    }
    let (listed, table): (BTreeSet<_>, BTreeSet<_>) =
        (listed.lines().collect(), table.lines().collect());
    let (old, new): (Vec<_>, Vec<_>) = (
        listed.difference(&table).collect(),
        table.difference(&listed).collect(),
    );
    assert!(
        old.is_empty() && new.is_empty(),
        "{manual}: {name} differ from the programs': REPOFLEET_BLESS=1 deploy/test.sh -p producer readme\n\
         manual: {old:#?}\nprograms: {new:#?}"
    );
}

/// An option as the manuals show it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct OptionRow {
    option: String,
    variable: String,
    default: String,
    what: String,
}

fn option_row(arg: &Arg) -> Option<OptionRow> {
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
    let variable = arg.get_env();
    let help = arg.get_help().map_or_else(String::new, ToString::to_string);
    Some(OptionRow {
        option: format!("`--{long}{value}`").replace('|', "\\|"),
        variable: variable.map_or_else(String::new, |name| format!("`{}`", name.to_string_lossy())),
        default: defaults.join(", "),
        what: help.replace('|', "\\|").replace('<', "\\<"),
    })
}

/// Collects every option of a command and its subcommands, with the subcommands that have it.
fn collect(command: &Command, name: &str, rows: &mut BTreeMap<OptionRow, Vec<String>>) {
    for arg in command.get_arguments() {
        if let Some(row) = option_row(arg) {
            rows.entry(row).or_default().push(name.to_owned());
        }
    }
    for sub in command.get_subcommands() {
        if sub.get_name() != "help" {
            collect(sub, format!("{name} {}", sub.get_name()).trim(), rows);
        }
    }
}

fn option_table(command: &Command) -> String {
    let mut rows = BTreeMap::new();
    collect(command, "", &mut rows);
    let mut table =
        String::from("| option | variable | default | of | what |\n|---|---|---|---|---|\n");
    for (row, commands) in rows {
        let OptionRow {
            option,
            variable,
            default,
            what,
        } = row;
        let commands = match &commands.join(", ")[..] {
            "" => "all".to_owned(),
            all => all.replace("dead list, dead show, dead replay, dead purge", "dead"),
        };
        table.push_str(&format!(
            "| {option} | {variable} | {default} | {commands} | {what} |\n"
        ));
    }
    table
}

#[test]
fn manuals_list_every_option() {
    let producer = option_table(&producer::cli::Cli::command());
    check_table(PRODUCER, "options", &producer);
    check_table(
        WORKER,
        "options",
        &option_table(&worker::cli::Cli::command()),
    );
}

/// A metric as `/metrics` describes it.
#[derive(Debug, Default)]
struct Metric {
    kind: String,
    labels: BTreeSet<String>,
    what: String,
}

/// The metrics in the text that `/metrics` serves, by name.
fn parse_metrics(text: Vec<u8>) -> BTreeMap<String, Metric> {
    let text = String::from_utf8(text).unwrap();
    let mut metrics: BTreeMap<String, Metric> = BTreeMap::new();
    let mut name = String::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (metric, what) = rest.split_once(' ').unwrap();
            metric.clone_into(&mut name);
            metrics.entry(name.clone()).or_default().what = what.replace('|', "\\|");
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
    metrics
}

fn worker_metrics() -> BTreeMap<String, Metric> {
    parse_metrics(Metrics::new().render())
}

fn observer_metrics() -> BTreeMap<String, Metric> {
    parse_metrics(FleetMetrics::new().render())
}

fn metric_table(metrics: &BTreeMap<String, Metric>) -> String {
    let mut table = String::from("| metric | kind | labels | what |\n|---|---|---|---|\n");
    for (name, Metric { kind, labels, what }) in metrics {
        let labels: Vec<_> = labels.iter().map(|label| format!("`{label}`")).collect();
        let labels = labels.join(", ");
        table.push_str(&format!("| `{name}` | {kind} | {labels} | {what} |\n"));
    }
    table
}

#[test]
fn manuals_list_every_metric() {
    check_table(WORKER, "metrics", &metric_table(&worker_metrics()));
    check_table(PRODUCER, "metrics", &metric_table(&observer_metrics()));
}

/// A renamed metric would silence an alert and empty a graph, and nobody would notice.
#[test]
fn alerts_and_dashboard_ask_for_metrics_that_there_are() {
    let mut metrics = worker_metrics();
    metrics.extend(observer_metrics());
    for path in [
        "deploy/prometheus/alerts.yml",
        "deploy/prometheus/alerts_test.yml",
        "deploy/grafana/dashboard.json",
    ] {
        let text = read(path);
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
                "{path} asks for {word}, which no program serves"
            );
            asked += 1;
        }
        assert!(asked > 10, "{path} asks for {asked} metrics");
    }
}

/// Replaces `{{ $labels.instance }}` by *instance*, and `{{ $value … }}` by *n*.
fn without_templates(text: &str) -> String {
    let mut shown = String::new();
    for part in text.split("{{") {
        match part.split_once("}}") {
            Some((template, rest)) => {
                let label = template.trim().strip_prefix("$labels.");
                shown.push_str(&format!("*{}*{rest}", label.unwrap_or("n")));
            }
            None => shown.push_str(part),
        }
    }
    shown
}

#[test]
fn manual_lists_every_alert() {
    let alerts = read("deploy/prometheus/alerts.yml");
    let mut table = String::from("| alert | severity | summary |\n|---|---|---|\n");
    for alert in alerts.split("- alert: ").skip(1) {
        let field = |name: &str| {
            let line = alert.lines().find_map(|l| l.trim().strip_prefix(name));
            line.expect("every alert has it").trim_matches('"')
        };
        let name = alert.lines().next().unwrap();
        let (severity, summary) = (field("severity: "), field("summary: "));
        let summary = without_templates(summary);
        table.push_str(&format!("| `{name}` | {severity} | {summary} |\n"));
    }
    check_table(ALERTS, "alerts", &table);
}

/// Code and meaning of each line below `Exit codes:` in a command's long help.
fn exit_codes(command: &Command) -> Vec<(String, String)> {
    let help = command.get_after_long_help().unwrap().to_string();
    let (_, listed) = help.split_once("Exit codes:\n").unwrap();
    let mut codes: Vec<(String, String)> = Vec::new();
    for line in listed.lines() {
        let line = line.trim();
        match line.split_once("  ") {
            Some((code, what)) => codes.push((code.to_owned(), what.trim().to_owned())),
            None => {
                let (_, what) = codes.last_mut().unwrap();
                what.push(' ');
                what.push_str(line);
            }
        }
    }
    codes
}

fn exit_code_table(command: &Command) -> String {
    let mut table = String::from("| code | meaning |\n|---|---|\n");
    for (code, what) in exit_codes(command) {
        table.push_str(&format!("| {code} | {what} |\n"));
    }
    table
}

#[test]
fn manuals_list_every_exit_code() {
    let producer = producer::cli::Cli::command();
    check_table(PRODUCER, "exit codes", &exit_code_table(&producer));
    let worker = worker::cli::Cli::command();
    check_table(WORKER, "exit codes", &exit_code_table(&worker));

    let numbers = |text: &str| -> Vec<u8> { text.split(", ").flat_map(str::parse).collect() };
    let listed: BTreeSet<u8> = exit_codes(&producer)
        .iter()
        .flat_map(|(code, _)| numbers(code))
        .collect();
    let readme = read("README.md");
    let (_, table) = readme.split_once("| exit code | meaning |").unwrap();
    let (table, _) = table.split_once("\n\n").unwrap();
    let rows = table.lines().filter_map(|line| line.split('|').nth(1));
    let readme: BTreeSet<u8> = rows.flat_map(|code| numbers(code.trim())).collect();
    assert_eq!(readme, listed, "README.md's exit codes");
}

/// The shell commands of a manual: lines of `sh` blocks and inline code. A command ends where the
/// shell would end it, or at a comment.
fn commands(text: &str) -> Vec<String> {
    let mut commands = Vec::new();
    let mut fence = None;
    for line in text.lines() {
        if let Some(language) = line.trim().strip_prefix("```") {
            fence = fence.is_none().then_some(language);
        } else if fence == Some("sh") {
            commands.push(line.trim().to_owned());
        } else if fence.is_none() {
            let inline = line.split('`').skip(1).step_by(2);
            commands.extend(inline.map(|code| code.replace("\\|", "|")));
        }
    }
    commands
}

/// Splits a simple command into words, without variables in front.
fn words(command: &str) -> Vec<String> {
    let command = command.trim_start_matches('(');
    let mut words: Vec<String> = Vec::new();
    for (index, part) in command.split('\'').enumerate() {
        if index % 2 == 1 {
            words.push(part.to_owned());
            continue;
        }
        for word in part.split_whitespace() {
            if word.starts_with(['#', '|', '&', ';', '>']) {
                return words;
            }
            let assigns = word.contains('=') && words.is_empty();
            if !assigns {
                words.push(word.to_owned());
            }
        }
    }
    words
}

/// Whether a word stands for something that the reader puts there: `RUN`, `…`, `[--json]`.
fn is_placeholder(word: &str) -> bool {
    let letters = word.chars().filter(|c| c.is_alphabetic());
    word.contains(['…', '[', '$', '{'])
        || letters.clone().count() > 2 && letters.clone().all(char::is_uppercase)
}

#[test]
fn commands_in_manuals_are_understood() {
    let mut understood = 0;
    for (path, text) in manuals() {
        for command in commands(&text) {
            let mut words = words(&command);
            if words.starts_with(&["cargo", "run", "--release", "--bin"].map(str::to_owned)) {
                words.drain(..4);
                words.retain(|word| word != "--");
            }
            let program = match words.first().map(String::as_str) {
                Some("producer") => producer::cli::Cli::command(),
                Some("worker") => worker::cli::Cli::command(),
                _ => continue,
            };
            if words.len() == 1 || words.iter().any(|word| is_placeholder(word)) {
                continue;
            }
            // `producer dead` and the like name a command without its operand.
            let result = program.try_get_matches_from(&words);
            if let Err(error) = result {
                use clap::error::ErrorKind::{
                    DisplayHelp, DisplayHelpOnMissingArgumentOrSubcommand, MissingRequiredArgument,
                    MissingSubcommand,
                };
                let named_only = [
                    DisplayHelp,
                    DisplayHelpOnMissingArgumentOrSubcommand,
                    MissingRequiredArgument,
                    MissingSubcommand,
                ];
                assert!(
                    named_only.contains(&error.kind()),
                    "{path}: {command}: {error}"
                );
            }
            understood += 1;
        }
    }
    assert!(understood > 20, "{understood} commands were looked at");
}

/// The anchor that a page gives a heading.
fn anchor(heading: &str) -> String {
    let heading = heading.trim_start_matches('#').trim().to_lowercase();
    let kept = heading
        .chars()
        .filter(|c| c.is_alphanumeric() || " -_".contains(*c));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

#[test]
fn links_in_manuals_lead_somewhere() {
    let manuals = manuals();
    let mut followed = 0;
    for (path, text) in &manuals {
        let folder = Path::new(path).parent().unwrap();
        for link in text.split("](").skip(1) {
            let (link, _) = link.split_once(')').unwrap();
            if link.contains("://") {
                continue;
            }
            let (file, wanted) = link.split_once('#').unwrap_or((link, ""));
            let target = match file {
                "" => in_checkout(path),
                file => in_checkout(folder.join(file).to_str().unwrap()),
            };
            assert!(target.exists(), "{path}: {link}: there is no such file");
            if !wanted.is_empty() {
                let page = fs::read_to_string(&target).unwrap();
                let mut headings = page.lines().filter(|line| line.starts_with('#'));
                assert!(
                    headings.any(|heading| anchor(heading) == wanted),
                    "{path}: {link}: there is no such heading"
                );
            }
            followed += 1;
        }
    }
    assert!(followed > 50, "{followed} links were looked at");
}

#[test]
fn readme_is_short() {
    let bytes = read("README.md").len();
    assert!(bytes <= 10 << 10, "README.md has {bytes} bytes");
}

/// Otherwise somebody would build one version and run another.
#[test]
fn images_are_named_by_this_version() {
    for path in [
        "compose.yaml",
        "deploy/compose.release.yaml",
        "deploy/Dockerfile",
        "deploy/kubernetes/base/kustomization.yaml",
        "deploy/kubernetes/overlays/try/kustomization.yaml",
        "deploy/kubernetes/README.md",
    ] {
        let text = read(path);
        let named = text.lines().filter_map(|line| {
            let tag = line.split_once("newTag: ");
            let image = || line.split_once("/worker:");
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
