//! What a round costs a site in time of its own.

use std::time::Duration;

/// Seconds that something usually takes if nothing else wants the processor: a shorter time is believed at once, a longer
/// one slowly.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Toll(f64);

/// Weight of a time longer than what is usual.
const LONGER_SHARE: f64 = 0.05;

impl Toll {
    pub(super) fn note(&mut self, took: Duration) {
        let took = took.as_secs_f64();
        let is_shorter = self.0 == 0.0 || took < self.0;
        self.0 = if is_shorter { took } else { self.0 + LONGER_SHARE * (took - self.0) };
    }

    pub(super) fn seconds(self) -> f64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_was_kept_waiting_says_little_of_what_the_work_takes() {
        let mut toll = Toll::default();
        [2.0, 0.5, 4.5, 0.7].into_iter().map(Duration::from_secs_f64).for_each(|took| toll.note(took));
        assert!((toll.seconds() - 0.7).abs() < 1e-9, "{toll:?}");
    }
}
