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
    up: Rate,
    down: Rate,
    /// Seconds of a round trip.
    rtt: f64,
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

/// Smaller transfers say more about delays than about rates.
const BYTES_MIN: u64 = 48 << 10;
/// After so many of these in a row a rate is forgotten: where it was taken for thin once, nothing else would ever correct it.
const SMALL_MAX: u32 = 256;
/// Weight of a rate below the best that was seen; others may have had a part of the link.
const SLOWER_SHARE: f64 = 0.1;

impl Meter {
    /// The link, payload bytes up and down, and the time in which something was under way.
    pub(super) fn read(&self) -> (Link, (u64, u64), Duration) {
        let state = lock(&self.0);
        let now = state.moving_since.map_or(Duration::ZERO, |since| since.elapsed());
        let link = Link { up: state.up.bytes, down: state.down.bytes, rtt: state.rtt };
        (link, state.bytes, state.moved + now)
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
        toll::note(&mut state.rtt, at.elapsed());
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
        let seconds = began.elapsed().as_secs_f64() - state.rtt;
        state.up.note(bytes, seconds);
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
        state.down.note(bytes.saturating_sub(first), seconds);
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

/// What is seen of one way.
#[derive(Default)]
struct Rate {
    /// Bytes per second; 0 if that is not known.
    bytes: f64,
    /// Small transfers since one has told something.
    small: u32,
}

impl Rate {
    fn note(&mut self, bytes: u64, seconds: f64) {
        if bytes < BYTES_MIN {
            self.small += 1;
            if self.small >= SMALL_MAX {
                *self = Self::default();
            }
            return;
        }
        let seen = bytes as f64 / seconds.max(1e-3);
        let rate = if seen > self.bytes { seen } else { self.bytes + SLOWER_SHARE * (seen - self.bytes) };
        *self = Self { bytes: rate, small: 0 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_small_tells_nothing_and_in_the_long_run_makes_forget() {
        let mut rate = Rate::default();
        rate.note(BYTES_MIN - 1, 0.01);
        assert_eq!(rate.bytes, 0.0);
        rate.note(BYTES_MIN, 0.01);
        assert_eq!(rate.bytes, BYTES_MIN as f64 / 0.01, "the best that was seen");
        rate.note(BYTES_MIN, 0.02);
        let slower = rate.bytes;
        assert!(
            (slower / (BYTES_MIN as f64 / 0.01) - 0.95).abs() < 1e-9,
            "others may have had a part of the link: {slower}"
        );
        (1..SMALL_MAX).for_each(|_| rate.note(1000, 9.0));
        assert_eq!(rate.bytes, slower);
        rate.note(1000, 9.0);
        assert_eq!((rate.bytes, rate.small), (0.0, 0));
    }

    #[test]
    fn both_ways_are_measured_and_time_under_way_counts_once() {
        let (meter, bytes, wait) = (Meter::default(), 4 * BYTES_MIN, Duration::from_millis(30));
        let [up, down] = [1, 2].map(|byte| Digest::of(&[byte]));
        let began = Instant::now();
        meter.sending(up, bytes);
        meter.receiving(down, BYTES_MIN);
        std::thread::sleep(wait);
        meter.sent(up);
        meter.received(down, bytes);
        let (link, counted, moved) = meter.read();
        assert!(link.up > 0.0 && link.up <= bytes as f64 / wait.as_secs_f64(), "{link:?}");
        assert!(link.down > 0.0 && link.down <= 3.0 / 4.0 * bytes as f64 / wait.as_secs_f64(), "{link:?}");
        assert_eq!(counted, (bytes, bytes));
        assert!(moved >= wait && moved <= began.elapsed());
        std::thread::sleep(wait);
        assert_eq!(meter.read().2, moved, "nothing is under way");
    }
}
