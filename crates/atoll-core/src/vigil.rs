//! When a standby may think that the leader is gone.
//!
//! It is never sure: the leader may only be slow, or cut off from the standby. So nothing rests on this but how soon a
//! standby tries; that there is one leader, whatever anybody thinks, is the object store's doing (see
//! [`Entry::Leads`](crate::journal::Entry::Leads)).

use crate::plan;
use crate::site::Time;

/// Watches for signs of life. No number in it is for an operator to choose.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Vigil {
    /// When it looked last.
    looked: Option<Time>,
    /// The sign it saw then.
    sign: Option<u64>,
    /// Seconds since that sign was new, as far as somebody looked.
    silence: f64,
    /// Seconds between two looks, smoothed.
    pause: f64,
    /// The longest seconds between two signs lately.
    longest: f64,
}

/// Silence of so many times the longest gap of late is no accident.
const GAPS: f64 = 3.0;
/// Nor is it before so many seconds: a disk or a network may hiccup.
const SILENCE_MIN: f64 = 2.0;
/// How fast a long gap is forgotten, per sign.
const FORGETTING: f64 = 0.1;
/// A look that comes later than so many usual pauses was itself held up, and saw nothing of the time between.
const HELD_UP: f64 = 2.0;

impl Vigil {
    /// Looks: `sign` is any number that changes as long as the leader lives.
    pub fn look(&mut self, now: Time, sign: u64) {
        let pause = self.looked.map_or(0.0, |looked| now.seconds_since(looked));
        let seen = if self.pause > 0.0 { pause.min(HELD_UP * self.pause) } else { pause };
        self.pause = plan::smooth(self.pause, seen, FORGETTING);
        self.silence += seen;
        self.looked = Some(now);
        if self.sign != Some(sign) {
            if self.sign.is_some() {
                self.longest = self.silence.max(self.longest * (1.0 - FORGETTING));
            }
            (self.sign, self.silence) = (Some(sign), 0.0);
        }
    }

    /// Whether the leader has been seen alive: a sign that has changed.
    pub fn has_seen_life(&self) -> bool {
        self.longest > 0.0
    }

    /// Whether it has been silent for too long.
    pub fn is_over(&self) -> bool {
        self.silence >= (GAPS * self.longest).max(SILENCE_MIN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Looks every quarter of a second from `at` on, at signs that change every `gap` seconds.
    fn watch(vigil: &mut Vigil, at: f64, seconds: f64, gap: f64) {
        let looks = (seconds / 0.25) as u32;
        for look in 0..looks {
            let now = at + f64::from(look) * 0.25;
            vigil.look(Time((now * 1e6) as u64), (now / gap) as u64);
        }
    }

    #[test]
    fn a_living_leader_is_never_given_up() {
        for gap in [0.5, 2.0, 10.0] {
            let mut vigil = Vigil::default();
            for look in 0..4000 {
                let now = f64::from(look) * 0.25;
                vigil.look(Time((now * 1e6) as u64), (now / gap) as u64);
                // One that is slower than SILENCE_MIN must have shown once how slow it is.
                assert!(!vigil.is_over() || (gap > SILENCE_MIN && now < 2.0 * gap), "{gap} {now}");
            }
        }
    }

    #[test]
    fn a_silent_leader_is_given_up_soon() {
        let mut vigil = Vigil::default();
        watch(&mut vigil, 0.0, 60.0, 0.5);
        assert!(vigil.has_seen_life() && !vigil.is_over());
        watch(&mut vigil, 60.0, 3.0, 1e9);
        assert!(vigil.is_over());
    }

    #[test]
    fn a_watcher_that_slept_blames_itself() {
        let mut vigil = Vigil::default();
        watch(&mut vigil, 0.0, 60.0, 0.5);
        vigil.look(Time(600_000_000), 119);
        assert!(!vigil.is_over(), "nobody looked in between");
        assert_eq!(Vigil::default().is_over(), Vigil::default().has_seen_life());
    }
}
