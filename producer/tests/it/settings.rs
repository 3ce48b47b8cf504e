//! Where options come from: the command line, the environment, a file; and what is made of the command line.

use std::fs;
use std::process::Command;

use common::exit::{OK, USAGE};

use crate::fleet::{Ended, Fleet, Running, bare_producer, in_clean_environment, names_in};

fn config(folder: &tempfile::TempDir, text: &str, arguments: &[&str]) -> Command {
    let file = folder.path().join("fleet.toml");
    fs::write(&file, text).unwrap();
    let mut command = bare_producer();
    command
        .arg("config")
        .arg("--config")
        .arg(file)
        .args(arguments);
    command
}

fn run(command: &mut Command) -> Ended {
    let ended = Running::start(command).wait();
    assert!(!ended.stdout.contains("s3cret") && !ended.stderr.contains("s3cret"));
    ended
}

#[test]
fn a_flag_precedes_a_variable_that_precedes_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let text = "limit = 1\ntimeout = \"2m\"\nmax_failures = \"7%\"\nonly = [\"a/*\", \"b/*\"]\nforce = true\n\
                broker-url = \"amqp://u:s3cret@h\"\ndetach = true\n[worker]\nanything = 1\n";
    let mut command = config(&folder, text, &["--limit", "3"]);
    command
        .env("TIMEOUT", "4m")
        .env("LIMIT", "2")
        .env("GITHUB_TOKEN", "s3cret")
        .env("EXCLUDE", "");
    let said = run(&mut command).with(OK).stdout;
    let file = folder.path().join("fleet.toml").display().to_string();
    for (line, origin) in [
        ("limit = \"3\"", "--limit"),
        ("timeout = \"4m\"", "variable TIMEOUT"),
        ("max-failures = \"7%\"", &file),
        ("only = [\"a/*\", \"b/*\"]", &file),
        ("force = true", &file),
        ("detach = true", &file),
        ("# broker-url is secret", &file),
        ("stall = \"1m\"", "default"),
        ("# exclude is not set", "default"),
    ] {
        let found = said.lines().find(|found| found.starts_with(line));
        let found = found.unwrap_or_else(|| panic!("{line} in {said}"));
        assert_eq!(found.split_once("  # ").unwrap().1.trim(), origin, "{said}");
    }
    assert!(
        said.contains("# Also in the environment, and not shown: GITHUB_TOKEN\n"),
        "{said}"
    );

    // Its output is such a file, except for options that need the secret.
    let file: Vec<_> = said
        .lines()
        .filter(|line| !line.starts_with("detach"))
        .collect();
    let again = run(&mut config(&folder, &file.join("\n"), &[]))
        .with(OK)
        .stdout;
    let values = |text: &str| -> Vec<String> {
        let lines = text.lines().filter(|line| !line.starts_with(['#', 'd']));
        lines
            .map(|line| line.split("  # ").next().unwrap().trim().to_owned())
            .collect()
    };
    assert_eq!(values(&again), values(&said));
}

#[test]
fn a_wrong_file_is_a_wrong_command_line() {
    let folder = tempfile::tempdir().unwrap();
    for (text, said) in [
        ("timeot = \"5m\"", "did you mean timeout?"),
        (
            "timeout = \"5 parsecs\"",
            "The value comes from timeout in ",
        ),
        (
            "broker-url = \"amqp://u:${PW}@h\"",
            "broker-url is a literal ${…}",
        ),
        ("broker-url = s3cret", "line 1 is not TOML"),
        ("detach = true", "--broker-url"),
    ] {
        let ended = run(&mut config(&folder, text, &[])).with(USAGE);
        assert!(ended.stderr.contains(said), "{text}: {}", ended.stderr);
    }
    let ended = run(bare_producer().args(["run", "--config", "/no/such/file"])).with(USAGE);
    assert!(ended.stderr.contains("check --config"), "{}", ended.stderr);
}

/// Docker does not substitute variables in env files.
#[test]
fn a_variable_with_another_in_it_is_refused_everywhere() {
    for (name, value) in [
        ("FEED", "${HOST}/repos.json"),
        ("BROKER_URL", "amqp://u:${PW}@rabbit"),
        ("GITHUB_TOKEN", "${TOKEN}"),
        ("STORE_URL", "s3://${BUCKET}"),
        ("ALLOW_HOST", "${HOST}"),
        ("LOG_LEVEL", "${LEVEL}"),
    ] {
        let ended = run(bare_producer().arg("run").env(name, value)).with(USAGE);
        let said = format!("error: {name} is a literal ${{…}}: Docker does not substitute");
        assert!(ended.stderr.starts_with(&said), "{}", ended.stderr);
    }
    for arguments in [
        ["--feed", "${F}"],
        ["--broker-url", "amqp://u:${PW}@h"],
        ["--store", "${S}"],
    ] {
        let ended = run(bare_producer().arg("run").args(arguments)).with(USAGE);
        assert!(
            ended.stderr.contains("is a literal ${…}"),
            "{}",
            ended.stderr
        );
    }
}

/// As `.env.example` has it: without quotes, which Docker would take for a part of the value.
#[test]
fn a_file_of_variables_works_in_a_shell() {
    let fleet = Fleet::of(&["alphagov/a", "nhsx/b", "other/c"]);
    let environment = fleet.path().join(".env");
    let example = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../.env.example"));
    assert!(example.unwrap().contains("\n#ONLY=alphagov/*,nhsx/*\n"));
    let text = "ONLY=alphagov/*,nhsx/*\nLOG_FORMAT=json\n# a comment\nEXCLUDE=*/b\n";
    fs::write(&environment, text).unwrap();
    let mut shell = in_clean_environment(Command::new("sh"));
    let script = format!(
        "set -a; . {}; set +a; exec {} run --dry-run --feed {} --store {}",
        environment.display(),
        env!("CARGO_BIN_EXE_producer"),
        fleet.feed_file().display(),
        fleet.store_folder().display()
    );
    let ended = Running::start(shell.arg("-c").arg(script)).wait().with(OK);
    let last = ended.log().pop().unwrap();
    let total = &last["context"]["metadata"]["summary"]["total_repos"];
    assert_eq!(total, 1, "{last}");
}

#[test]
fn completions_pages_and_versions_are_of_this_program() {
    for shell in ["bash", "zsh", "fish"] {
        let said = run(bare_producer().args(["completions", shell]))
            .with(OK)
            .stdout;
        assert!(
            said.contains("producer") && said.contains("max-failures"),
            "{shell}"
        );
    }
    // The shell takes it.
    let script = format!(
        "source <({} completions bash) && complete -p producer",
        env!("CARGO_BIN_EXE_producer")
    );
    let mut bash = in_clean_environment(Command::new("bash"));
    let said = run(bash.args(["-c", &script])).with(OK).stdout;
    assert!(said.contains("_producer"), "{said}");

    let folder = tempfile::tempdir().unwrap();
    run(bare_producer()
        .arg("man")
        .arg(folder.path())
        .env("LIMIT", "5"))
    .with(OK);
    let pages = names_in(folder.path());
    for page in ["producer.1", "producer-run.1", "producer-dead-replay.1"] {
        assert!(pages.iter().any(|name| name == page), "{page} in {pages:?}");
    }
    let page = fs::read_to_string(folder.path().join("producer-run.1")).unwrap();
    assert!(
        page.contains("max\\-failures") && !page.contains("LIMIT=5"),
        "{page}"
    );

    let said = run(bare_producer().arg("--version")).with(OK).stdout;
    for part in ["producer 0.", "commit:", "digest format:  gitingest-"] {
        assert!(said.contains(part), "{said}");
    }
}

/// At 80 columns, with the examples before the options.
#[test]
fn help_fits_a_terminal() {
    // A URL cannot be broken.
    let is_wide = |line: &&str| line.chars().count() > 80 && !line.contains("https://");
    for (help, lines) in [("-h", 90), ("--help", 1000)] {
        let mut command = bare_producer();
        let said = run(command.args(["run", help]).env("COLUMNS", "80"))
            .with(OK)
            .stdout;
        let wide = said.lines().find(is_wide);
        assert_eq!(wide, None, "{help}");
        assert!(said.lines().count() <= lines, "{}", said.lines().count());
        assert!(
            said.find("Examples:").unwrap() < said.find("Options:").unwrap(),
            "{said}"
        );
    }
}
