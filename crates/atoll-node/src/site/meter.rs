//! What the network tells about itself while it is used: how long a round trip takes, how fast payloads go up and
//! come down, and for how long some were under way.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use atoll_core::hash::Digest;
use atoll_core::plan::Link;

use super::toll;
use crate::coordinator::lock;

/// Shared by the tasks that send and receive.
#[derive(Clone, Default)]
pub(super) struct Meter(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    link: Link,
    /// Payload bytes sent and received.
    bytes: (u64, u64),
    asked: Option<(u64, Instant)>,
    uploads: BTreeMap<Digest, (Instant, u64)>,
    /// When the first bytes of a payload came, and how many they were.
    downloads: BTreeMap<Digest, (Instant, u64)>,
    /// Since when something has been under way.
    moving_since: Option<Instant>,
    moved: Duration,
}

/// Smaller transfers say more about delays than about rates, unless they take long.
const BYTES_MIN: u64 = 48 << 10;
const LONG_SECONDS: f64 = 1.0;
/// Weight of a rate below the best that was seen; others may have had a part of the link.
const SLOWER_SHARE: f64 = 0.1;

impl Meter {
    /// The link, payload bytes up and down, and the time in which something was under way.
    pub(super) fn read(&self) -> (Link, (u64, u64), Duration) {
        let state = lock(&self.0);
        let now = state.moving_since.map_or(Duration::ZERO, |since| since.elapsed());
        (state.link, state.bytes, state.moved + now)
    }

    /// What was under way is lost.
    pub(super) fn disconnected(&self) {
        let mut state = lock(&self.0);
        state.asked = None;
        state.uploads.clear();
        state.downloads.clear();
        state.settle();
    }

    /// A status of that number goes out.
    pub(super) fn asked(&self, number: u64) {
        lock(&self.0).asked.get_or_insert((number, Instant::now()));
    }

    /// A standing has come that takes a status of that number into account.
    pub(super) fn answered(&self, heard: u64) {
        let mut state = lock(&self.0);
        let Some((_, at)) = state.asked.take_if(|(number, _)| *number <= heard) else { return };
        toll::note(&mut state.link.rtt, at.elapsed());
    }

    /// A payload begins to go up.
    pub(super) fn sending(&self, digest: Digest, bytes: u64) {
        let mut state = lock(&self.0);
        state.moving_since.get_or_insert_with(Instant::now);
        state.uploads.insert(digest, (Instant::now(), bytes));
    }

    /// The coordinator has all of it.
    pub(super) fn sent(&self, digest: Digest) {
        let mut state = lock(&self.0);
        let Some((began, bytes)) = state.uploads.remove(&digest) else { return };
        state.bytes.0 += bytes;
        let seconds = began.elapsed().as_secs_f64() - state.link.rtt;
        note(&mut state.link.up, bytes, seconds);
        state.settle();
    }

    /// Some bytes of a payload or of weights have come.
    pub(super) fn receiving(&self, digest: Digest, bytes: u64) {
        let mut state = lock(&self.0);
        state.moving_since.get_or_insert_with(Instant::now);
        state.downloads.entry(digest).or_insert((Instant::now(), bytes));
    }

    /// All of it is here.
    pub(super) fn received(&self, digest: Digest, bytes: u64) {
        let mut state = lock(&self.0);
        let Some((began, first)) = state.downloads.remove(&digest) else { return };
        state.bytes.1 += bytes;
        let seconds = began.elapsed().as_secs_f64();
        note(&mut state.link.down, bytes.saturating_sub(first), seconds);
        state.settle();
    }
}

impl State {
    fn settle(&mut self) {
        if self.uploads.is_empty()
            && self.downloads.is_empty()
            && let Some(since) = self.moving_since.take()
        {
            self.moved += since.elapsed();
        }
    }
}

fn note(rate: &mut f64, bytes: u64, seconds: f64) {
    if bytes < BYTES_MIN && seconds < LONG_SECONDS {
        return;
    }
    let seen = bytes as f64 / seconds.max(1e-3);
    *rate = if seen > *rate { seen } else { *rate + SLOWER_SHARE * (seen - *rate) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_small_and_fast_tells_nothing_of_a_link() {
        let mut rate = 0.0;
        note(&mut rate, BYTES_MIN - 1, 0.01);
        assert_eq!(rate, 0.0);
        note(&mut rate, 20_000, 2.0);
        assert_eq!(rate, 10_000.0, "it took too long to be a matter of delays");
        note(&mut rate, BYTES_MIN, 0.01);
        assert_eq!(rate, BYTES_MIN as f64 / 0.01, "the best that was seen");
        note(&mut rate, BYTES_MIN, 0.02);
        assert!(
            (rate / (BYTES_MIN as f64 / 0.01) - 0.95).abs() < 1e-9,
            "others may have had a part of the link: {rate}"
        );
        note(&mut rate, 0, 0.0);
        assert!(rate.is_finite());
    }

    #[test]
    fn both_ways_are_measured_and_time_under_way_counts_once() {
        let (meter, bytes, wait) = (Meter::default(), 4 * BYTES_MIN, Duration::from_millis(30));
        let [up, down] = [1, 2].map(|byte| Digest::of(&[byte]));
        meter.sending(up, bytes);
        meter.receiving(down, BYTES_MIN);
        std::thread::sleep(wait);
        meter.sent(up);
        meter.received(down, bytes);
        let (link, counted, moved) = meter.read();
        assert!(link.up > 0.0 && link.up <= bytes as f64 / wait.as_secs_f64(), "{link:?}");
        assert!(link.down > 0.0 && link.down <= 3.0 / 4.0 * bytes as f64 / wait.as_secs_f64(), "{link:?}");
        assert_eq!(counted, (bytes, bytes));
        assert!(moved >= wait);
        std::thread::sleep(wait);
        assert_eq!(meter.read().2, moved, "nothing is under way");
    }
}
