//! What each worker has in hand: `producer status --workers`.

use anyhow::Result;
use common::broker::{InHand, SharedBroker};
use common::job::Job;
use common::text::{counted, format_duration, printable, unix_millis};
use serde::Serialize;
use std::time::Duration;
use time::OffsetDateTime;

use crate::roll_call::roll_call;
use crate::terminal::table::table;
use crate::terminal::{print, width};

/// A job that a worker has in hand; without a repository, a worker that has none.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct AtWork {
    worker: String,
    repo: Option<String>,
    run: Option<String>,
    /// `None` of a worker of an earlier version.
    seconds: Option<u64>,
}

/// Asks the workers, and prints a line for each repository that one has in hand, the oldest first.
pub(super) async fn show(broker: &SharedBroker, json: bool) -> Result<()> {
    let workers = broker.backlog().await?.workers;
    let answers = roll_call(broker, workers).await?;
    let silent = workers.saturating_sub(answers.len() as u64);
    let jobs = at_work(answers, OffsetDateTime::now_utc());
    if json {
        for job in &jobs {
            print(&(serde_json::to_string(job)? + "\n"))?;
        }
        return Ok(());
    }
    let rows = jobs.into_iter().map(|job| {
        let seconds = job.seconds.map(Duration::from_secs);
        let since = seconds.map(format_duration).unwrap_or_default();
        let repo = job.repo.unwrap_or_else(|| "nothing in hand".to_owned());
        [
            printable(&job.worker),
            since,
            repo,
            job.run.unwrap_or_default(),
        ]
    });
    let rows: Vec<_> = rows.collect();
    print(&table(
        ["WORKER", "FOR", "REPOSITORY", "RUN"],
        rows,
        width(),
    ))?;
    if silent > 0 {
        let silent = counted(silent, "connected worker", "connected workers");
        print(&format!("{silent} did not answer\n"))?;
    } else if workers == 0 {
        print("no worker is connected\n")?;
    }
    Ok(())
}

fn at_work(answers: Vec<InHand>, now: OffsetDateTime) -> Vec<AtWork> {
    let now = unix_millis(now);
    let mut all = Vec::new();
    for answer in answers {
        let known = answer.jobs.iter().enumerate().filter_map(|(i, id)| {
            let (run, key) = Job::parse_id(id)?;
            let since = answer.since_millis.get(i);
            Some(AtWork {
                worker: answer.worker.clone(),
                repo: Some(key.repo.to_string()),
                run: Some(run.to_string()),
                seconds: since.map(|since| u64::try_from((now - since) / 1000).unwrap_or(0)),
            })
        });
        let known: Vec<_> = known.collect();
        match known.is_empty() {
            false => all.extend(known),
            true => all.push(AtWork {
                worker: answer.worker,
                repo: None,
                run: None,
                seconds: None,
            }),
        }
    }
    all.sort_by(|a, b| {
        b.seconds
            .cmp(&a.seconds)
            .then_with(|| a.worker.cmp(&b.worker))
    });
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_job_comes_first_and_an_idle_worker_last() {
        let answer = |worker: &str, jobs: &[(&str, i64)]| InHand {
            answers: String::new(),
            worker: worker.to_owned(),
            jobs: jobs
                .iter()
                .map(|(repo, _)| format!("run-1/{repo}@2026-01-01T00:00:00Z"))
                .collect(),
            since_millis: jobs.iter().map(|(_, since)| *since).collect(),
            tokens: None,
        };
        let now = OffsetDateTime::UNIX_EPOCH + Duration::from_secs(100);
        let found = at_work(
            vec![
                answer("w1", &[]),
                answer("w2", &[("a/b", 90_500), ("c/d", 1_000)]),
            ],
            now,
        );
        let found: Vec<_> = found
            .iter()
            .map(|job| (job.worker.as_str(), job.repo.as_deref(), job.seconds))
            .collect();
        let expected = [
            ("w2", Some("c/d"), Some(99)),
            ("w2", Some("a/b"), Some(9)),
            ("w1", None, None),
        ];
        assert_eq!(found, expected);
    }
}
