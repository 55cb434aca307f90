//! What something usually takes if nothing is in its way.

use std::time::Duration;

/// Weight of a time longer than what is usual.
const LONGER_SHARE: f64 = 0.05;

/// Moves the `usual` seconds, 0 if nothing is known, by what it took now: a shorter time is believed at once, a longer one
/// slowly.
pub(super) fn note(usual: &mut f64, took: Duration) {
    let took = took.as_secs_f64();
    let is_shorter = *usual == 0.0 || took < *usual;
    *usual = if is_shorter { took } else { *usual + LONGER_SHARE * (took - *usual) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_was_kept_waiting_says_little_of_what_the_work_takes() {
        let mut usual = 0.0;
        [2.0, 0.5, 4.5, 0.7].into_iter().map(Duration::from_secs_f64).for_each(|took| note(&mut usual, took));
        assert!((usual - 0.7).abs() < 1e-9, "{usual}");
    }
}
