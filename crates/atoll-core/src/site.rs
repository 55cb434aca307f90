//! Who a site is and when something happened.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// The name of a site: 1 to 40 of `a-z`, `0-9` and `-`. Merging goes in the order of these names. A copy costs next to
/// nothing.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SiteId(Arc<str>);

/// The name cannot be a site's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' cannot name a site\nhint: use 1 to 40 of the characters a-z, 0-9 and -")]
pub struct SiteIdError(String);

impl FromStr for SiteId {
    type Err = SiteIdError;

    fn from_str(name: &str) -> Result<Self, SiteIdError> {
        let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if (1..=40).contains(&name.len()) && name.chars().all(allowed) {
            Ok(Self(name.into()))
        } else {
            Err(SiteIdError(name.chars().take(60).collect()))
        }
    }
}

impl TryFrom<String> for SiteId {
    type Error = SiteIdError;

    fn try_from(name: String) -> Result<Self, SiteIdError> {
        name.parse()
    }
}

impl From<SiteId> for String {
    fn from(site: SiteId) -> Self {
        site.0.to_string()
    }
}

impl fmt::Display for SiteId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// A moment, in microseconds since some start that the caller chose. The core never asks for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Time(pub u64);

impl Time {
    /// Seconds from `earlier` to `self`; 0 if `earlier` is later.
    pub fn seconds_since(self, earlier: Time) -> f64 {
        self.0.saturating_sub(earlier.0) as f64 / 1e6
    }

    /// The moment `seconds` after this one.
    pub fn after(self, seconds: f64) -> Time {
        Time(self.0.saturating_add((seconds.max(0.0) * 1e6) as u64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_plain() {
        assert!("lisbon-a100".parse::<SiteId>().is_ok());
        for bad in ["", "Lisbon", "a b", "../x", &"a".repeat(41)] {
            assert!(bad.parse::<SiteId>().is_err(), "{bad}");
        }
    }
}
