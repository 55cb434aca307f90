//! What coordinators tell a site, as lines of its log at the level `trace`, for whoever wants to check afterwards that it
//! was true: that every commit and every contribution that was said to be in the model is in the journal.

use atoll_core::hash::Digest;
use atoll_core::journal::Settled;
use atoll_core::round::Standing;
use serde::{Deserialize, Serialize};

/// The target of these lines.
pub const TARGET: &str = "atoll::told";
/// What they begin with.
const MARK: &str = "told ";

/// A site was told this.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Told {
    /// The session that it speaks of.
    pub session: u64,
    /// For each fragment the latest version and its digest.
    pub fragments: Vec<(u64, Digest)>,
    /// What became of contributions of that session, by their numbers.
    pub settled: Vec<(u64, Settled)>,
}

impl Told {
    /// What a line of a log tells, if it does.
    pub fn read(line: &str) -> Option<Self> {
        serde_json::from_str(line.split_once(MARK)?.1).ok()
    }
}

/// Writes the line.
pub(super) fn note(standing: &Standing) {
    if tracing::enabled!(target: TARGET, tracing::Level::TRACE) {
        let Standing { session, fragments, settled, .. } = standing;
        let told = Told { session: *session, fragments: fragments.clone(), settled: settled.clone() };
        // It holds nothing that JSON cannot say.
        tracing::trace!(target: TARGET, "{MARK}{}", serde_json::to_string(&told).unwrap_or_default());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_a_log_are_read() {
        let told =
            Told { session: 7, fragments: vec![(3, Digest::of(b"x"))], settled: vec![(1, Settled::Committed(3))] };
        let line = format!("2026-01-01T00:00:00Z TRACE told {}", serde_json::to_string(&told).unwrap());
        assert_eq!(Told::read(&line), Some(told));
        assert_eq!(Told::read("2026-01-01T00:00:00Z  INFO listening"), None);
    }
}
