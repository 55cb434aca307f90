//! When bytes arrive: the arithmetic of a link, without sockets. A piece that is read `now` passes the
//! [`Bottleneck`], which its whole link shares, then makes its connection's [`Journey`].

use std::time::Duration;

use atoll_core::rng::Rng;
use tokio::time::Instant;

use super::Wan;

/// Payload of a packet on an Ethernet: 1500 bytes less IP's and TCP's headers and time stamps.
pub(super) const PACKET: usize = 1448;
/// The queue of even the shortest link.
const QUEUE_BYTES_MIN: usize = 64 << 10;
/// Timers are a millisecond coarse; a queue shorter than this would run dry meanwhile.
const QUEUE_MIN: Duration = Duration::from_millis(2);

/// One way of a link: pieces leave it one after the other in the order in which they came.
#[derive(Debug)]
pub(super) struct Bottleneck {
    wan: Wan,
    /// When all that is in the queue has left.
    free_at: Instant,
    /// The longest time that what is in the queue needs.
    queue: Duration,
}

impl Bottleneck {
    /// An idle one. Its queue holds a round trip's bytes, at least 64 KiB.
    pub(super) fn new(wan: Wan, now: Instant) -> Self {
        let queue = wan.sending(QUEUE_BYTES_MIN).max(wan.round_trip()).max(QUEUE_MIN);
        Self { wan, free_at: now, queue }
    }

    /// Puts a piece behind all others; returns when its last bit has left.
    pub(super) fn pass(&mut self, now: Instant, bytes: usize) -> Instant {
        self.free_at = self.free_at.max(now) + self.wan.sending(bytes);
        self.free_at
    }

    /// When the queue has room again; none if it has some now.
    pub(super) fn full_until(&self, now: Instant) -> Option<Instant> {
        let until = self.free_at.checked_sub(self.queue)?;
        (until > now).then_some(until)
    }
}

/// One way of one connection: the bytes arrive in order, however late.
#[derive(Debug)]
pub(super) struct Journey {
    wan: Wan,
    rng: Rng,
    last: Instant,
}

impl Journey {
    /// A journey whose luck comes from `seed`.
    pub(super) fn new(wan: Wan, seed: u64, now: Instant) -> Self {
        Self { wan, rng: Rng::new(seed), last: now }
    }

    /// When a piece arrives that left the bottleneck at `left`. If one of its packets is lost, the
    /// receiver sees nothing of it, nor of what follows, until the packet is sent again: a round trip.
    pub(super) fn arrival(&mut self, left: Instant, bytes: usize) -> Instant {
        let late = self.wan.jitter().mul_f64(self.rng.unit());
        let packets = bytes.div_ceil(PACKET);
        let lost = (0..packets).filter(|_| self.rng.chance(self.wan.loss())).count();
        let stall = if lost > 0 { self.wan.round_trip() } else { Duration::ZERO };
        self.last = self.last.max(left + self.wan.round_trip() / 2 + late + stall);
        self.last
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn wan(text: &str) -> Wan {
        text.parse().unwrap()
    }

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn pieces_leave_one_after_the_other() {
        let start = Instant::now();
        let mut way = Bottleneck::new(wan("8mbit"), start);
        assert_eq!(way.pass(start, 1000), start + MS);
        assert_eq!(way.pass(start, 2000), start + 3 * MS);
        assert_eq!(way.pass(start + 10 * MS, 1000), start + 11 * MS, "what was not used is not saved up");
    }

    #[test]
    fn a_full_queue_says_until_when() {
        let start = Instant::now();
        for (text, queue) in [("8mbit", 65_536), ("8mbit,100ms", 100_000), ("1gbit", 250_000)] {
            let mut way = Bottleneck::new(wan(text), start);
            way.pass(start, queue);
            assert_eq!(way.full_until(start), None, "{text}");
            way.pass(start, 1000);
            let until = way.full_until(start).unwrap();
            assert_eq!(until, start + way.wan.sending(1000), "{text}");
            assert_eq!(way.full_until(until), None, "{text}");
        }
        let mut endless = Bottleneck::new(wan("50ms"), start);
        endless.pass(start, usize::MAX);
        assert_eq!(endless.full_until(start), None);
    }

    #[test]
    fn losses_come_as_often_as_asked_and_cost_a_round_trip() {
        let start = Instant::now();
        let link = wan("10ms,1%");
        let mut journey = Journey::new(link, 7, start);
        let mut stalls = 0;
        for second in 0..20_000 {
            let left = start + Duration::from_secs(second);
            match (journey.arrival(left, PACKET) - left).as_millis() {
                5 => {}
                15 => stalls += 1,
                other => panic!("{other} ms"),
            }
        }
        assert!((120..280).contains(&stalls), "{stalls} of 20000");
    }

    #[test]
    fn what_follows_a_lost_packet_waits_for_it() {
        let start = Instant::now();
        let mut journey = Journey::new(wan("100ms,50%"), 3, start);
        let arrivals: Vec<Instant> = (0..100).map(|step| journey.arrival(start + step * MS, PACKET)).collect();
        let first = arrivals.iter().zip(0..).find(|(at, step)| **at > start + 50 * MS + *step * MS).unwrap();
        assert_eq!(*first.0, arrivals[first.1 as usize + 1], "the next came at once with it");
    }

    proptest! {
        #[test]
        fn nothing_is_too_early_too_fast_or_out_of_order(
            seed: u64,
            pieces in prop::collection::vec((0u64..20_000, 0usize..12_000, 0usize..3), 1..60),
        ) {
            let start = Instant::now();
            let link = wan("10mbit,40ms,3ms,2%");
            let mut way = Bottleneck::new(link, start);
            let mut journeys: Vec<Journey> = (0..3).map(|number| Journey::new(link, seed ^ number, start)).collect();
            let (mut now, mut sent, mut last) = (start, 0, [start; 3]);
            for (pause_us, bytes, connection) in pieces {
                now += Duration::from_micros(pause_us);
                let left = way.pass(now, bytes);
                sent += bytes;
                prop_assert!(left >= now + link.sending(bytes));
                prop_assert!(left >= start + link.sending(sent));
                let at = journeys[connection].arrival(left, bytes);
                prop_assert!(at >= left + link.round_trip() / 2 && at >= last[connection]);
                last[connection] = at;
            }
        }
    }
}
