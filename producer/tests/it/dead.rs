//! `producer dead`: letters on a real broker, looked at, replayed, removed.

use std::net::TcpListener;
use std::process::{Command, Stdio};

use common::broker::{Broker, Event, Position, Settlement, Waiting};
use common::fault::FaultKind;
use common::ids::RunId;
use common::job::Job;
use common::outcome::Outcome;
use futures::StreamExt;
use futures::stream;
use rustix::process::Signal;
use serde_json::{Value, json};
use testing::broker_contract::{job, outcome};
use tokio::task::block_in_place;

use crate::fleet::{Ended, Running, bare_producer};
use crate::status::{Queues, ended, next};

fn named(run: &RunId, repo: &str) -> Job {
    Job {
        repo: repo.parse().unwrap(),
        ..job(run, 0)
    }
}

/// Four dead letters: `acme/one` and `other/three`, given up by the broker; `acme/two`, too large;
/// and of the run `later` one of a version that this program does not know.
struct Letters {
    queues: Queues,
    run: RunId,
    later: RunId,
}

impl Letters {
    async fn new() -> Self {
        let queues = Queues::new().await;
        let run = RunId::new();
        // Enqueued first, and first of all that were in the same second.
        let later = RunId::try_from(format!("{run}-later")).unwrap();
        let jobs = [
            Job {
                version: 99,
                ..named(&later, "other/later")
            },
            named(&run, "acme/one"),
            named(&run, "acme/two"),
            named(&run, "other/three"),
        ];
        let enqueued = queues.broker.enqueue(stream::iter(jobs).boxed()).await;
        assert_eq!(enqueued.unwrap().jobs, 4);
        let mut deliveries = queues.deliveries(4).await;
        for _ in 0..3 {
            let delivery = next(&mut deliveries).await;
            if delivery.job.repo.name() == "two" {
                let Event::Outcome(mut record) =
                    outcome(&delivery.job, Outcome::Failed(FaultKind::TooLarge))
                else {
                    unreachable!()
                };
                record.message = "over 1 GiB \u{1b}[31m".to_owned();
                let record = Event::Outcome(record);
                queues.broker.record(&record).await.unwrap();
            }
            delivery.settle(Settlement::Dead).await.unwrap();
        }
        let letters = Self { queues, run, later };
        // The consumer itself has buried what is no job, on its way to the one behind it.
        letters
            .wait(|waiting| waiting.dead == 4 && waiting.ready == 0)
            .await;
        drop(deliveries);
        letters
    }

    async fn wait(&self, so: impl Fn(Waiting) -> bool) {
        self.queues.wait(so).await;
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = bare_producer();
        command.arg("dead").args(arguments);
        self.queues.named_to(command)
    }

    /// Runs it when all of these letters are back with the broker.
    async fn dead(&self, letters: u64, arguments: &[&str]) -> Ended {
        self.wait(|waiting| waiting.dead == letters).await;
        ended(self.command(arguments))
    }

    /// The repositories that a list with this filter shows, without their owners.
    async fn listed(&self, letters: u64, filter: &[&str]) -> Vec<String> {
        let arguments = [&["list", "--json"], filter].concat();
        let listed = self.dead(letters, &arguments).await.with(0);
        let lines = listed.stdout.lines();
        let lines = lines.map(|line| serde_json::from_str::<Value>(line).unwrap());
        lines
            .map(|line| {
                let repo = line["repo"].as_str().unwrap();
                repo.split_once('/').unwrap().1.to_owned()
            })
            .collect()
    }

    /// Every job that the ledger holds of `run`.
    async fn published(&self, run: &str) -> Vec<Job> {
        let mut history = self.queues.broker.history(Position::Start).await.unwrap();
        let mut jobs = Vec::new();
        while let Some(entry) = history.next().await {
            if let Event::Job(job) = entry.unwrap().event
                && job.run.as_str() == run
            {
                jobs.push(job);
            }
        }
        jobs
    }
}

/// The run in `… replayed as run RUN, …`.
fn replay_run(sentence: &str) -> String {
    let (_, rest) = sentence.split_once(" as run ").expect(sentence);
    let end = rest.find([',', '\n']).unwrap();
    rest[..end].to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn letters_are_listed_by_what_is_known_about_them() {
    let letters = Letters::new().await;
    let listed = letters.dead(4, &["list", "--json"]).await.with(0);
    let lines: Vec<Value> = listed
        .stdout
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let part = |name: &str| {
        lines
            .iter()
            .map(|line| line[name].clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(
        json!(part("repo")),
        json!(["other/later", "acme/one", "acme/two", "other/three"])
    );
    assert_eq!(
        json!(part("class")),
        json!(["poison", "killed", "too_large", "killed"])
    );
    let (run, later) = (letters.run.as_str(), letters.later.as_str());
    assert_eq!(json!(part("run")), json!([later, run, run, run]));
    assert_eq!(lines[1]["id"], named(&letters.run, "acme/one").id());
    assert_eq!(lines[1]["pushed_at"], "2026-01-01T00:00:00Z");
    assert!(lines[0]["age_seconds"].is_u64(), "{}", lines[0]);
    assert!(
        lines[0]["message"].as_str().unwrap().contains("99"),
        "{}",
        lines[0]
    );

    let table = letters.dead(4, &["list"]).await.with(0).stdout;
    assert!(table.starts_with("AGE"), "{table}");
    assert!(table.contains("over 1 GiB \\u{1b}[31m\n"), "{table}");
    assert!(table.ends_with("\n4 dead letters\n"), "{table}");

    for (filter, expected) in [
        (&["--owner", "ACME"][..], &["one", "two"][..]),
        (&["--owner", "o*r"], &["later", "three"]),
        (&["--class", "killed"], &["one", "three"]),
        (
            &["--class", "killed", "--class", "poison"],
            &["later", "one", "three"],
        ),
        (&["--class", "killed", "--limit", "1"], &["one"]),
        (&["--run", later], &["later"]),
        (&["--run", run, "--owner", "other"], &["three"]),
        (&["--newer-than", "1d"], &["later", "one", "two", "three"]),
        (&["--older-than", "1d"], &[]),
    ] {
        assert_eq!(letters.listed(4, filter).await, expected, "{filter:?}");
    }
    let two = letters.listed(4, &["--limit", "2"]).await;
    assert_eq!(two.len(), 2, "{two:?}");
    let none = letters
        .dead(4, &["list", "--older-than", "1d"])
        .await
        .with(0);
    assert_eq!(none.stdout, "no dead letter of 4 fits\n");
    for wrong in [
        &["--class", "bad"][..],
        &["--older-than", "3w"],
        &["--owner", "["],
    ] {
        let arguments = [&["list"], wrong].concat();
        letters.dead(4, &arguments).await.with(2);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_letter_is_shown_with_all_that_is_known() {
    let letters = Letters::new().await;
    let id = named(&letters.run, "acme/two").id();
    for name in [&id, "acme/two"] {
        let shown = letters.dead(4, &["show", name]).await.with(0).stdout;
        assert!(shown.contains(&format!("id          {id}\n")), "{shown}");
        assert!(shown.contains("class       too_large\n"), "{shown}");
        assert!(
            shown.contains("message     over 1 GiB \\u{1b}[31m\n"),
            "{shown}"
        );
        assert!(shown.contains("content     {\"version\":1,"), "{shown}");
    }
    let odd = letters
        .dead(4, &["show", "other/later"])
        .await
        .with(0)
        .stdout;
    assert!(
        odd.contains("content     no job that this version can read"),
        "{odd}"
    );
    assert!(odd.contains(" bytes, \"{"), "how it begins: {odd}");
    let listed = letters
        .dead(4, &["list", "--json", "--class", "poison"])
        .await;
    let poison: Value = serde_json::from_str(&listed.with(0).stdout).unwrap();
    let payload = poison["payload"].as_str().unwrap();
    assert!(payload.starts_with("{\"version\":99,"), "{payload}");
    let id = poison["id"].as_str().unwrap();
    let shown = letters.dead(4, &["show", id]).await.with(0).stdout;
    assert!(shown.contains(&format!("id          {id}\n")), "{shown}");
    let none = letters.dead(4, &["show", "acme/none"]).await.with(2);
    assert!(
        none.stderr
            .contains("none of the 4 dead letters is acme/none"),
        "{}",
        none.stderr
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replay_is_a_new_job_that_says_what_it_is_one_of() {
    let letters = Letters::new().await;
    let arguments = ["replay", "--owner", "acme", "--dry-run"];
    let dry = letters.dead(4, &arguments).await.with(0).stdout;
    assert!(dry.contains("acme/one") && !dry.contains("other/"), "{dry}");
    assert!(
        dry.ends_with("\n2 dead letters would be replayed\n"),
        "{dry}"
    );
    letters
        .wait(|waiting| waiting.dead == 4 && waiting.ready == 0)
        .await;

    let one = letters
        .dead(4, &["replay", "--class", "too_large"])
        .await
        .with(0)
        .stdout;
    let run = replay_run(&one);
    assert_eq!(one, format!("1 dead letter replayed as run {run}\n"));
    let published = letters.published(&run).await;
    let original = named(&letters.run, "acme/two");
    let expected = Job {
        run: RunId::try_from(run).unwrap(),
        replay_of: Some(original.id()),
        ..original
    };
    assert_eq!(published, std::slice::from_ref(&expected));

    // What is no job takes no place among them.
    let arguments = ["replay", "--limit", "2", "--dry-run"];
    let dry = letters.dead(3, &arguments).await.with(0).stdout;
    assert!(dry.contains("\n2 dead letters would be replayed"), "{dry}");

    let rest = letters.dead(3, &["replay"]).await.with(0).stdout;
    let run = replay_run(&rest);
    assert_eq!(
        rest,
        format!("2 dead letters replayed as run {run}, 1 left (not a job)\n")
    );
    assert_eq!(letters.published(&run).await.len(), 2);
    letters
        .wait(|waiting| waiting.dead == 1 && waiting.ready == 3)
        .await;
    let mut deliveries = letters.queues.deliveries(1).await;
    let delivery = next(&mut deliveries).await;
    assert_eq!((delivery.attempt, delivery.waits), (0, 0));
    assert_eq!(delivery.job, expected);
    // Given up again, it is a letter that knows where it comes from.
    delivery.settle(Settlement::Dead).await.unwrap();
    drop(deliveries);
    let shown = letters.dead(2, &["show", "acme/two"]).await.with(0).stdout;
    let lineage = format!("replay of   {}\n", named(&letters.run, "acme/two").id());
    assert!(shown.contains(&lineage), "{shown}");
    assert!(shown.contains("class       killed\n"), "{shown}");

    // The replay can be followed.
    let mut status = bare_producer();
    let store = tempfile::tempdir().unwrap();
    status
        .args(["status", &run, "--json", "--store"])
        .arg(store.path());
    let status = ended(letters.queues.named_to(status)).with(0);
    let status: Value = serde_json::from_str(&status.stdout).unwrap();
    assert_eq!(
        (&status["total_repos"], &status["open"]),
        (&json!(2), &json!(2))
    );
}

/// At one letter in a thousand seconds, the first comes at once and the second never.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replay_is_paced_and_stops_between_two_letters() {
    for (signal, code, left) in [(Signal::TERM, 0, 3), (Signal::INT, 130, 3)] {
        let letters = Letters::new().await;
        letters.wait(|waiting| waiting.dead == 4).await;
        let replay = Running::start(&mut letters.command(&["replay", "--rate", "0.001"]));
        letters.wait(|waiting| waiting.ready == 1).await;
        replay.signal(signal);
        let replay = block_in_place(|| replay.wait()).with(code).stdout;
        let run = replay_run(&replay);
        assert_eq!(
            replay,
            format!(
                "1 dead letter replayed as run {run}, 2 left (stopped before), 1 left (not a job)\n"
            )
        );
        letters
            .wait(|waiting| waiting.dead == left && waiting.ready == 1)
            .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_purge_removes_what_fits_and_wants_to_be_sure() {
    let letters = Letters::new().await;
    let unsure = letters.dead(4, &["purge"]).await.with(2);
    assert!(unsure.stderr.contains("--yes"), "{}", unsure.stderr);
    let dry = letters
        .dead(4, &["purge", "--dry-run", "--class", "poison"])
        .await
        .with(0);
    assert!(
        dry.stdout.ends_with("\n1 dead letter would be removed\n"),
        "{}",
        dry.stdout
    );
    letters.wait(|waiting| waiting.dead == 4).await;

    let odd = letters
        .dead(4, &["purge", "--yes", "--class", "poison"])
        .await
        .with(0);
    assert_eq!(odd.stdout, "1 dead letter removed\n");
    assert_eq!(letters.listed(3, &[]).await, ["one", "two", "three"]);
    let acme = letters
        .dead(3, &["purge", "--yes", "--owner", "acme"])
        .await
        .with(0);
    assert_eq!(acme.stdout, "2 dead letters removed\n");
    assert_eq!(letters.listed(1, &[]).await, ["three"]);
    letters.dead(1, &["purge", "--yes"]).await.with(0);
    let none = letters.dead(0, &["list"]).await.with(0);
    assert_eq!(none.stdout, "no dead letters\n");
    letters.wait(|waiting| waiting.ready == 0).await;
}

/// The acknowledgements of letters get lost on their way, and nobody says so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_letter_that_may_still_be_there_does_not_count_as_removed() {
    let letters = Letters::new().await;
    letters.wait(|waiting| waiting.dead == 4).await;
    let mut command = bare_producer();
    command.args(["dead", "purge", "--yes"]);
    let (proxy, command) = letters.queues.named_through_a_proxy_to(command);
    // `basic.ack`.
    proxy.stall_at(&[0, 60, 0, 80]);
    let purge = ended(command).with(69);
    assert_eq!(
        purge.stdout,
        "0 dead letters removed, 4 left (stopped before)\n"
    );
    proxy.cut();
    letters.wait(|waiting| waiting.dead == 4).await;
}

/// The command is told to stop while it waits for a broker that says nothing.
#[test]
fn a_signal_before_the_answer_is_no_answer() {
    for (signal, code) in [(Signal::TERM, 143), (Signal::INT, 130)] {
        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut command = bare_producer();
        command
            .args(["dead", "list", "--json", "--broker-url"])
            .arg(format!("amqp://{}", silent.local_addr().unwrap()));
        let list = Running::start(&mut command);
        let _connection = silent.accept().unwrap();
        list.signal(signal);
        assert_eq!(list.wait().with(code).stdout, "");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_list_without_the_ledger_says_that_it_is() {
    let letters = Letters::new().await;
    letters.wait(|waiting| waiting.dead == 4).await;
    let mut command = bare_producer();
    command.args(["dead", "list", "--json"]);
    let (proxy, command) = letters.queues.named_through_a_proxy_to(command);
    // What is written to find the ledger's end.
    proxy.stall_at(b"mark-");
    let listed = ended(command).with(0);
    assert_eq!(listed.stdout.lines().count(), 4, "{}", listed.stdout);
    let why = "why they are here is not known: ";
    assert!(listed.stderr.contains(why), "{}", listed.stderr);
}

/// The broker never says that it has the job. It may have it all the same, so its run is named.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replay_that_fails_says_so_and_names_its_run() {
    let letters = Letters::new().await;
    letters.wait(|waiting| waiting.dead == 4).await;
    let mut command = bare_producer();
    command.args(["dead", "replay"]);
    let (proxy, command) = letters.queues.named_through_a_proxy_to(command);
    proxy.stall_at(b"replayOf");
    let replay = ended(command).with(69);
    let run = replay_run(&replay.stdout);
    assert_eq!(
        replay.stdout,
        format!(
            "0 dead letters replayed as run {run}, 3 left (stopped before), 1 left (not a job)\n"
        )
    );
    let announced = format!("replaying 3 dead letters as run {run}");
    assert!(replay.stderr.contains(&announced), "{}", replay.stderr);
    drop(proxy);

    // Also where nobody reads it.
    letters.wait(|waiting| waiting.dead == 4).await;
    let mut command = bare_producer();
    command.args(["dead", "replay"]);
    let (proxy, mut command) = letters.queues.named_through_a_proxy_to(command);
    proxy.stall_at(b"replayOf");
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    command.stdout(Stdio::from(writer));
    let replay = block_in_place(|| command.output()).unwrap();
    assert_eq!(replay.status.code(), Some(69), "{replay:?}");
}

#[test]
fn without_a_broker_there_are_no_letters() {
    let mut command = bare_producer();
    command.args(["dead", "list"]);
    let ended = Running::start(&mut command).wait().with(2);
    assert!(ended.stderr.contains("set BROKER_URL"), "{}", ended.stderr);
    assert_eq!(ended.stdout, "");
}

/// Others see the letters that it has no use for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_more_letters_are_taken_than_asked_for() {
    let letters = Letters::new().await;
    // The first is replayed at once, the second held.
    let arguments = ["replay", "--limit", "2", "--rate", "0.001"];
    let replay = Running::start(&mut letters.command(&arguments));
    letters
        .wait(|waiting| waiting.ready == 1 && waiting.dead > 0)
        .await;
    replay.signal(Signal::TERM);
    block_in_place(|| replay.wait()).with(0);
    letters.wait(|waiting| waiting.dead == 3).await;
}
