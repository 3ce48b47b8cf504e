//! What a process learns about its token while it works.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::warn;

use crate::fetch::answer::TokenRefusal;

/// How long a token that its host does not know is kept back. Sent with every request, it could get
/// the address into trouble; never sent again, one mistake of the host would cost it for weeks.
const KEPT_BACK: Duration = Duration::from_secs(600);

/// Says once that a token is refused, and when it may be sent.
#[derive(Debug, Default)]
pub(super) struct TokenWatch {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    refused: Option<Instant>,
    told: HashSet<TokenRefusal>,
}

impl TokenWatch {
    /// Whether the token may be sent `now`.
    pub(super) fn is_usable(&self, now: Instant) -> bool {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let refused = state.refused;
        refused.is_none_or(|at| now.saturating_duration_since(at) >= KEPT_BACK)
    }

    /// Notes that `host` refused the token. Returns whether that is said, which it is once.
    pub(super) fn refused(&self, host: &str, why: TokenRefusal, now: Instant) -> bool {
        let new = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            if why == TokenRefusal::Unknown {
                state.refused = Some(now);
            }
            state.told.insert(why)
        };
        match why {
            _ if !new => {}
            TokenRefusal::Unknown => warn!(
                operation = "token",
                host,
                status = 401,
                "{host} refused the token in GITHUB_TOKEN (status 401); fetching without it; give one that is valid"
            ),
            TokenRefusal::SingleSignOn => warn!(
                operation = "token",
                host,
                status = 403,
                "the token in GITHUB_TOKEN is not authorized for the single sign-on of an organization on {host} (status 403); fetching its repositories without it; authorize the token there"
            ),
        }
        new
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_that_is_not_known_is_kept_back_for_a_while() {
        let (watch, start) = (TokenWatch::default(), Instant::now());
        assert!(watch.is_usable(start));
        assert!(watch.refused("h", TokenRefusal::SingleSignOn, start));
        assert!(watch.is_usable(start), "others may take it");
        assert!(watch.refused("h", TokenRefusal::Unknown, start));
        assert!(!watch.is_usable(start));
        for why in [TokenRefusal::Unknown, TokenRefusal::SingleSignOn] {
            assert!(!watch.refused("h", why, start), "said already");
        }
        assert!(watch.is_usable(start + KEPT_BACK));
    }
}
