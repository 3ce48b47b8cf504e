//! The tokens of a process: which one a job gets, and what hosts say of them.

use std::collections::{BTreeMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use common::fault::{Fault, FaultKind};
use common::text::format_duration;
use strum::{AsRefStr, VariantArray};
use tracing::{info, warn};
use url::Url;

use crate::fetch::answer::TokenRefusal;
use crate::fetch::token::HostToken;

/// How long a token that its host does not know is kept back. Sent with every request, it could get
/// the address into trouble; never sent again, one mistake of the host would cost it for weeks.
const KEPT_BACK: Duration = Duration::from_secs(600);

/// The tokens of a process. Those of one host are used in turn.
#[derive(Debug, Default)]
pub struct TokenPool {
    tokens: Mutex<Vec<Pooled>>,
}

#[derive(Debug)]
struct Pooled {
    token: HostToken,
    /// Used up until then.
    rests_until: Option<Instant>,
    /// When its host did not know it, with nothing fetched with it since.
    refused: Option<Instant>,
    /// What was said of it.
    told: HashSet<TokenRefusal>,
    /// How many tokens were chosen before it was.
    turn: u64,
}

/// What has become of a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, AsRefStr, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum TokenState {
    /// It is sent.
    Usable,
    /// Its host limits it for now.
    Resting,
    /// Its host does not know it.
    Refused,
}

impl Pooled {
    fn new(token: HostToken) -> Self {
        Self {
            token,
            rests_until: None,
            refused: None,
            told: HashSet::new(),
            turn: 0,
        }
    }

    /// How much longer it rests.
    fn rest(&self, now: Instant) -> Option<Duration> {
        let rest = self.rests_until?.saturating_duration_since(now);
        (rest > Duration::ZERO).then_some(rest)
    }

    fn is_kept_back(&self, now: Instant) -> bool {
        let refused = self.refused;
        refused.is_some_and(|at| now.saturating_duration_since(at) < KEPT_BACK)
    }

    fn state(&self, now: Instant) -> TokenState {
        match self.refused {
            Some(_) => TokenState::Refused,
            None if self.rest(now).is_some() => TokenState::Resting,
            None => TokenState::Usable,
        }
    }
}

impl TokenPool {
    /// Holds these tokens.
    pub fn new(tokens: Vec<HostToken>) -> Self {
        Self {
            tokens: Mutex::new(tokens.into_iter().map(Pooled::new).collect()),
        }
    }

    /// Counts each host's tokens by their state.
    pub fn count(&self, now: Instant) -> BTreeMap<(String, TokenState), i64> {
        let mut counts = BTreeMap::new();
        for pooled in self.tokens().iter() {
            let host = pooled.token.host.to_string();
            *counts.entry((host, pooled.state(now))).or_default() += 1;
        }
        counts
    }

    /// Chooses the token of a job's first attempt at `url`; `None` is for a path.
    ///
    /// # Errors
    /// [`FaultKind::Throttled`] if all tokens of the host are used up.
    pub(super) fn turn(&self, url: Option<&Url>, now: Instant) -> Result<TokenTurn<'_>, Fault> {
        let mut turn = TokenTurn {
            pool: self,
            url: url.cloned(),
            current: None,
            tried: Vec::new(),
            refused: false,
        };
        turn.current = turn.next(now);
        match turn.current {
            None => turn.all_rest(now).map_or(Ok(turn), Err),
            Some(_) => Ok(turn),
        }
    }

    fn tokens(&self) -> MutexGuard<'_, Vec<Pooled>> {
        self.tokens.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One job's way through the tokens of its host.
#[derive(Debug)]
pub(super) struct TokenTurn<'a> {
    pool: &'a TokenPool,
    url: Option<Url>,
    /// The index of the token in use.
    current: Option<usize>,
    tried: Vec<usize>,
    /// Whether the host refused the token in use.
    refused: bool,
}

impl TokenTurn<'_> {
    /// The token to fetch with, if any.
    pub(super) fn token(&self) -> Option<HostToken> {
        Some(self.pool.tokens()[self.current?].token.clone())
    }

    /// Notes that the host refused the token in use, and says so once.
    pub(super) fn refused(&mut self, why: TokenRefusal, now: Instant) {
        let Some(current) = self.current else { return };
        self.refused = true;
        let (token, new) = {
            let pooled = &mut self.pool.tokens()[current];
            if why == TokenRefusal::Unknown {
                pooled.refused = Some(now);
            }
            (pooled.token.clone(), pooled.told.insert(why))
        };
        let HostToken { host, source, .. } = &token;
        match why {
            _ if !new => {}
            TokenRefusal::Unknown => warn!(
                operation = "token",
                host = %host,
                status = 401,
                "{host} refused the token in {source} (status 401); fetching without it; give one that is valid"
            ),
            TokenRefusal::SingleSignOn => warn!(
                operation = "token",
                host = %host,
                status = 403,
                "the token in {source} is not authorized for the single sign-on of an organization on {host} (status 403); fetching its repositories without it; authorize the token there"
            ),
        }
    }

    /// Notes that the token in use is used up for this long.
    pub(super) fn used_up(&mut self, rest: Duration, now: Instant) {
        let Some(current) = self.current else { return };
        let (token, new) = {
            let pooled = &mut self.pool.tokens()[current];
            let new = pooled.rest(now).is_none();
            pooled.rests_until = pooled.rests_until.max(Some(now + rest));
            (pooled.token.clone(), new && rest > Duration::ZERO)
        };
        if new {
            let HostToken { host, source, .. } = &token;
            info!(
                operation = "token",
                host = %host,
                rest_seconds = rest.as_secs(),
                "{host} limits the token in {source}; not sending it for {}",
                format_duration(rest)
            );
        }
    }

    /// Notes that a fetch succeeded.
    pub(super) fn worked(&self) {
        if let Some(current) = self.current.filter(|_| !self.refused) {
            self.pool.tokens()[current].refused = None;
        }
    }

    /// Takes the next token if the fault may be due to the one in use; otherwise returns the fault. That
    /// of a host whose tokens are all used up lasts until the first of them is back.
    pub(super) fn after(&mut self, mut fault: Fault, now: Instant) -> Result<(), Fault> {
        let throttled = fault.kind == FaultKind::Throttled;
        let limit = fault.retry_after.filter(|_| throttled && !self.refused);
        if let Some(rest) = limit {
            self.used_up(rest, now);
        }
        let refused = self.refused && (throttled || fault.kind == FaultKind::Gone);
        let Some(current) = self.current.filter(|_| refused || limit.is_some()) else {
            return Err(fault);
        };
        self.tried.push(current);
        if let Some(next) = self.next(now) {
            self.current = Some(next);
            self.refused = false;
            return Ok(());
        }
        if limit.is_some()
            && let Some(rest) = self.all_rest(now)
        {
            fault.retry_after = rest.retry_after;
        }
        Err(fault)
    }

    /// Returns the token of the host that was chosen least recently, of those that can be used and that
    /// this job has not tried.
    fn next(&self, now: Instant) -> Option<usize> {
        let url = self.url.as_ref()?;
        let mut tokens = self.pool.tokens();
        let turn = tokens.iter().map(|pooled| pooled.turn).max()? + 1;
        let usable = tokens.iter_mut().enumerate().filter(|(index, pooled)| {
            let is_usable = !pooled.is_kept_back(now) && pooled.rest(now).is_none();
            is_usable && pooled.token.is_for(url) && !self.tried.contains(index)
        });
        let (index, next) = usable.min_by_key(|(_, pooled)| pooled.turn)?;
        next.turn = turn;
        Some(index)
    }

    /// Returns the fault of a host that limits all of its tokens that are not refused.
    fn all_rest(&self, now: Instant) -> Option<Fault> {
        let url = self.url.as_ref()?;
        let tokens = self.pool.tokens();
        let of_host = tokens.iter().filter(|pooled| pooled.token.is_for(url));
        let sent = of_host.filter(|pooled| !pooled.is_kept_back(now));
        let rests: Option<Vec<_>> = sent.map(|pooled| pooled.rest(now)).collect();
        let rest = rests?.into_iter().min()?;
        let message = format!(
            "every token for it is used up; the first is back in {}",
            format_duration(rest)
        );
        Some(Fault::throttled(message, Some(rest)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    fn pool(hosts: &[&str]) -> TokenPool {
        let token = |(index, host): (usize, &&str)| HostToken {
            host: host.parse().unwrap(),
            secret: format!("sesame-{index}").into(),
            source: format!("MINE_{index}"),
        };
        TokenPool::new(hosts.iter().enumerate().map(token).collect())
    }

    fn url(host: &str) -> Url {
        Url::parse(&format!("https://{host}/o/n")).unwrap()
    }

    /// The secret of the token that a job at `host` gets.
    fn chosen(pool: &TokenPool, host: &str, now: Instant) -> Option<String> {
        let turn = pool.turn(Some(&url(host)), now).unwrap();
        turn.token().map(|token| token.secret.to_string())
    }

    fn counts(pool: &TokenPool, now: Instant) -> Vec<(String, i64)> {
        let counts = pool.count(now).into_iter();
        counts
            .map(|((host, state), count)| (format!("{host} {}", state.as_ref()), count))
            .collect()
    }

    #[test]
    fn tokens_of_a_host_are_used_in_turn() {
        let (pool, now) = (pool(&["a", "b", "a", "a"]), Instant::now());
        let of_a: Vec<_> = (0..4).map(|_| chosen(&pool, "a", now).unwrap()).collect();
        assert_eq!(of_a, ["sesame-0", "sesame-2", "sesame-3", "sesame-0"]);
        assert_eq!(chosen(&pool, "b", now).unwrap(), "sesame-1");
        assert_eq!(chosen(&pool, "c", now), None);
        assert!(pool.turn(None, now).unwrap().token().is_none());
    }

    #[test]
    fn a_limited_token_rests_and_the_next_one_is_taken() {
        let (pool, now) = (pool(&["a", "a"]), Instant::now());
        let limit = |rest| Fault::throttled("limited", Some(rest));
        let mut turn = pool.turn(Some(&url("a")), now).unwrap();
        turn.after(limit(MINUTE), now).unwrap();
        assert_eq!(*turn.token().unwrap().secret, "sesame-1");
        assert_eq!(
            counts(&pool, now),
            [("a usable".to_owned(), 1), ("a resting".to_owned(), 1)]
        );
        for _ in 0..2 {
            assert_eq!(chosen(&pool, "a", now).unwrap(), "sesame-1");
        }
        // The host's wish is that of the token that is back first.
        let fault = turn.after(limit(MINUTE * 5), now).unwrap_err();
        assert_eq!(
            (fault.retry_after, &*fault.message),
            (Some(MINUTE), "limited")
        );
        let fault = pool.turn(Some(&url("a")), now + MINUTE / 2).unwrap_err();
        assert_eq!(
            (fault.kind, fault.retry_after),
            (FaultKind::Throttled, Some(MINUTE / 2))
        );
        assert_eq!(chosen(&pool, "a", now + MINUTE).unwrap(), "sesame-0");
    }

    #[test]
    fn a_token_that_is_used_up_by_a_fetch_is_not_taken_next() {
        let (pool, now) = (pool(&["a", "a"]), Instant::now());
        let mut turn = pool.turn(Some(&url("a")), now).unwrap();
        turn.used_up(MINUTE, now);
        turn.used_up(MINUTE / 2, now);
        turn.worked();
        let later = now + MINUTE - Duration::from_secs(1);
        assert_eq!(counts(&pool, later)[1], ("a resting".to_owned(), 1));
        assert_eq!(chosen(&pool, "a", later).unwrap(), "sesame-1");
        assert_eq!(counts(&pool, now + MINUTE), [("a usable".to_owned(), 2)]);
    }

    #[test]
    fn a_refused_token_is_kept_back_for_a_while() {
        let (pool, now) = (pool(&["a", "a"]), Instant::now());
        let gone = || Fault::gone("no such repository");
        let mut turn = pool.turn(Some(&url("a")), now).unwrap();
        turn.refused(TokenRefusal::Unknown, now);
        // Without a token it failed; with the other it may not.
        turn.after(gone(), now).unwrap();
        assert_eq!(*turn.token().unwrap().secret, "sesame-1");
        assert_eq!(turn.after(gone(), now).unwrap_err(), gone());
        assert_eq!(
            counts(&pool, now),
            [("a usable".to_owned(), 1), ("a refused".to_owned(), 1)]
        );
        assert_eq!(chosen(&pool, "a", now).unwrap(), "sesame-1");

        let later = now + KEPT_BACK;
        let turn = pool.turn(Some(&url("a")), later).unwrap();
        assert_eq!(*turn.token().unwrap().secret, "sesame-0");
        assert_eq!(counts(&pool, later)[1].0, "a refused");
        turn.worked();
        assert_eq!(counts(&pool, later), [("a usable".to_owned(), 2)]);
    }

    #[test]
    fn without_a_token_that_it_knows_a_host_is_asked_without() {
        let (pool, now) = (pool(&["a"]), Instant::now());
        let mut turn = pool.turn(Some(&url("a")), now).unwrap();
        turn.refused(TokenRefusal::Unknown, now);
        let limit = Fault::throttled("limited", Some(MINUTE));
        assert_eq!(
            turn.after(limit.clone(), now).unwrap_err().retry_after,
            Some(MINUTE)
        );
        assert_eq!(counts(&pool, now), [("a refused".to_owned(), 1)]);
        assert_eq!(chosen(&pool, "a", now), None);
    }

    #[test]
    fn a_token_without_single_sign_on_serves_others() {
        let (pool, now) = (pool(&["a", "a"]), Instant::now());
        let mut turn = pool.turn(Some(&url("a")), now).unwrap();
        turn.refused(TokenRefusal::SingleSignOn, now);
        turn.after(Fault::gone("not there"), now).unwrap();
        assert_eq!(*turn.token().unwrap().secret, "sesame-1");
        assert_eq!(counts(&pool, now), [("a usable".to_owned(), 2)]);
        assert_eq!(chosen(&pool, "a", now).unwrap(), "sesame-0");
    }

    #[test]
    fn a_refusal_is_said_once() {
        let (pool, now) = (pool(&["a"]), Instant::now());
        let mut turn = pool.turn(Some(&url("a")), now).unwrap();
        for why in [TokenRefusal::Unknown, TokenRefusal::SingleSignOn] {
            turn.refused(why, now);
            turn.refused(why, now);
        }
        assert_eq!(pool.tokens()[0].told.len(), 2);
    }
}
