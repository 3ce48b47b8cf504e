//! A job, one repository at one `pushedAt`, as a message.

use serde::{Deserialize, Serialize};

use crate::fault::Fault;
use crate::ids::{JobKey, PushedAt, RepoRef, RunId};

/// The only version of the wire format that this program writes and reads.
pub const WIRE_VERSION: u32 = 1;

/// The format of digests, part of their metadata: a digest in another format is made anew.
///
/// Change it whenever the digest of an unchanged commit changes.
pub const DIGEST_FORMAT: &str = "gitingest-0.3.1/1";

/// One repository to digest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Job {
    /// [`WIRE_VERSION`] of the program that wrote it.
    pub version: u32,
    /// The run that published it.
    pub run: RunId,
    /// What to digest.
    pub repo: RepoRef,
    /// Where to fetch it from: `https://…`, or a path if the worker allows local sources.
    pub url: String,
    /// The push that the digest will cover.
    pub pushed_at: PushedAt,
    /// Digest it even if the store has this `pushedAt` already (`--force`).
    #[serde(default)]
    pub force: bool,
    /// [`Job::id`] of the dead letter that it replays, if it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replay_of: Option<String>,
    /// The span that enqueued it, as W3C's `traceparent`, where there are
    /// [traces](crate::telemetry::traces). It stays with the job wherever that goes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traceparent: Option<String>,
}

impl Job {
    /// Returns `{run}/{owner}/{name}@{pushedAt}`, which is the same for every copy of the message.
    pub fn id(&self) -> String {
        format!("{}/{}@{}", self.run, self.repo, self.pushed_at)
    }

    /// Parses a [`Job::id`].
    pub fn parse_id(id: &str) -> Option<(RunId, JobKey)> {
        let (run, rest) = id.split_once('/')?;
        let (repo, pushed_at) = rest.split_once('@')?;
        Some((
            RunId::try_from(run.to_owned()).ok()?,
            JobKey {
                repo: repo.parse().ok()?,
                pushed_at: PushedAt::new(pushed_at).ok()?,
            },
        ))
    }

    /// Returns the repository and push, which identify the job in any run.
    pub fn key(&self) -> JobKey {
        JobKey {
            repo: self.repo.clone(),
            pushed_at: self.pushed_at.clone(),
        }
    }

    /// Serializes the message's body.
    pub fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a job has only strings and numbers")
    }

    /// Parses a message's body. Unknown fields are ignored.
    ///
    /// # Errors
    /// [`FaultKind::Poison`](crate::fault::FaultKind::Poison) for anything that is not a job of a
    /// known version.
    pub fn decode(body: &[u8]) -> Result<Self, Fault> {
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let Version { version } = serde_json::from_slice(body).map_err(Fault::poison)?;
        if version != WIRE_VERSION {
            return Err(Fault::poison(format!(
                "wire version {version} is unknown; this program reads {WIRE_VERSION}"
            )));
        }
        serde_json::from_slice(body).map_err(Fault::poison)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::FaultKind;

    /// The wire format is a contract: version 1 as first published.
    const GOLDEN_V1: &str = r#"{"version":1,"run":"20261123T130000Z-0a1b2c","repo":"alphagov/whitehall","url":"https://github.com/alphagov/whitehall","pushedAt":"2026-11-22T10:00:00Z","force":false}"#;

    #[test]
    fn version_1_reads_and_writes_as_published() {
        let job = Job::decode(GOLDEN_V1.as_bytes()).unwrap();
        assert_eq!(String::from_utf8(job.encode()).unwrap(), GOLDEN_V1);
        assert_eq!(
            job.id(),
            "20261123T130000Z-0a1b2c/alphagov/whitehall@2026-11-22T10:00:00Z"
        );
    }

    #[test]
    fn an_id_says_which_job_it_was() {
        let (run, key) = Job::parse_id("20261123T130000Z-0a1b2c/a/b@2026-11-22T10:00:00Z").unwrap();
        assert_eq!(run.as_str(), "20261123T130000Z-0a1b2c");
        assert_eq!(key.repo.to_string(), "a/b");
        assert_eq!(key.pushed_at.as_str(), "2026-11-22T10:00:00Z");
        for id in ["", "a", "a/b", "a/b/c", "a/b@c", "/a/b@c", "r/../x@1"] {
            assert!(Job::parse_id(id).is_none(), "{id:?}");
        }
    }

    #[test]
    fn a_replay_says_what_it_is_one_of() {
        let replay = GOLDEN_V1.replace("false}", "false,\"replayOf\":\"run-1/a/b@1\"}");
        let job = Job::decode(replay.as_bytes()).unwrap();
        assert_eq!(job.replay_of.as_deref(), Some("run-1/a/b@1"));
        assert_eq!(String::from_utf8(job.encode()).unwrap(), replay);
    }

    #[test]
    fn fields_of_later_programs_are_ignored_and_absent_options_have_defaults() {
        let later = GOLDEN_V1.replace("\"force\":false", "\"colour\":\"blue\"");
        assert_eq!(
            Job::decode(later.as_bytes()).unwrap(),
            Job::decode(GOLDEN_V1.as_bytes()).unwrap()
        );
    }

    #[test]
    fn what_is_not_a_job_is_poison() {
        for body in [
            "",
            "null",
            "{",
            "{}",
            &GOLDEN_V1.replace("\"version\":1", "\"version\":2"),
            &GOLDEN_V1.replace("alphagov/whitehall\",\"url", "../etc\",\"url"),
            &GOLDEN_V1.replace("2026-11-22T10:00:00Z", ""),
        ] {
            let fault = Job::decode(body.as_bytes()).unwrap_err();
            assert_eq!(fault.kind, FaultKind::Poison, "{body}");
        }
    }
}
