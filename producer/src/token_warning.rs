//! Warns of a run that is about to fetch many repositories from a host without a token for it.

use std::collections::BTreeMap;
use std::time::Duration;

use common::broker::{InHand, SharedBroker};
use common::text::thousands;
use tracing::{debug, warn};
use worker::fetch::policy::FetchPolicy;
use worker::fetch::token::{host_for_token, remedy};

use crate::roll_call::roll_call;

/// More repositories than this are many.
const MANY: u64 = 500;
/// How often workers are asked until one has answered.
const ASK_EVERY: Duration = Duration::from_secs(5);

/// The hosts from which a run fetches many repositories, each with their number.
#[derive(Debug, PartialEq, Eq)]
pub struct BusyHosts(BTreeMap<String, u64>);

impl BusyHosts {
    /// Counts the repositories that are to be fetched.
    pub fn of<'a>(urls: impl Iterator<Item = &'a str>) -> Self {
        let mut counts = BTreeMap::new();
        for host in urls.filter_map(host_for_token) {
            *counts.entry(host).or_default() += 1;
        }
        counts.retain(|_, count| *count > MANY);
        Self(counts)
    }

    /// Whether there is nothing to warn of, whoever has which token.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Warns for a worker with this policy in this process.
    pub fn warn(&self, policy: &FetchPolicy) {
        let tokens: Vec<_> = policy
            .tokens
            .iter()
            .map(|token| token.host.to_string())
            .collect();
        for (host, count) in self.0.iter().filter(|(host, _)| !tokens.contains(host)) {
            warn_of(host, *count, "");
        }
    }

    /// Asks the workers of a fleet for which hosts they have tokens, once there are any, and warns.
    pub async fn warn_for_fleet(self, broker: SharedBroker) {
        loop {
            let workers = broker.backlog().await.map_or(0, |backlog| backlog.workers);
            if workers > 0
                && let Ok(answers) = roll_call(&broker, workers).await
                && !answers.is_empty()
            {
                self.warn_for(&answers);
                return;
            }
            tokio::time::sleep(ASK_EVERY).await;
        }
    }

    fn warn_for(&self, answers: &[InHand]) {
        let tell: Vec<_> = answers
            .iter()
            .filter_map(|answer| answer.tokens.as_ref())
            .collect();
        for (host, count) in &self.0 {
            let lack = tell.iter().filter(|tokens| !tokens.contains(host)).count();
            match lack {
                0 => debug!(operation = "token", "no worker lacks a token for {host}"),
                _ => warn_of(
                    host,
                    *count,
                    &format!(" on {lack} of {} workers", tell.len()),
                ),
            }
        }
    }
}

fn warn_of(host: &str, count: u64, on: &str) {
    warn!(
        operation = "token",
        host,
        repositories = count,
        "{} repositories to fetch from {host} without a token for it{on}: hosts limit anonymous downloads, and \
         this run may wait for hours; give {}",
        thousands(count),
        remedy(host)
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_with_many_repositories_are_counted() {
        let many = |url: &'static str, count: usize| std::iter::repeat_n(url, count);
        let urls = many("https://github.com/a/b", 501)
            .chain(many("https://gitlab.com/a/b", 500))
            .chain(many("https://git.example.org:8443/a", 502))
            .chain(many("http://git.example.org/a", 900))
            .chain(many("/srv/a", 900));
        let expected = [("git.example.org:8443", 502), ("github.com", 501)];
        let expected = expected
            .map(|(host, count)| (host.to_owned(), count))
            .into();
        assert_eq!(BusyHosts::of(urls), BusyHosts(expected));
        assert!(BusyHosts::of(many("https://github.com/a/b", 500)).is_empty());
    }
}
