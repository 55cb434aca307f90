//! How many gets may be unanswered. Where several coordinators give, none may be asked for much more than it gives in a moment: what a
//! slow one owes, no other can give. So a window widens as long as answers come about as soon as the soonest, and narrows when they
//! have to queue.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, SemaphorePermit};

use crate::coordinator::lock;

/// An answer may queue for so long.
const QUEUE: Duration = Duration::from_millis(500);

/// By so much an answer that had to queue longer narrows the window: it tells of a moment that is past.
const NARROWER: f64 = 0.25;

/// A window between two bounds.
pub(super) struct Window {
    room: Semaphore,
    least: usize,
    most: usize,
    state: Mutex<State>,
}

struct State {
    limit: f64,
    /// Whether an answer had to queue: until then the window doubles with each round trip, and grows by one from then on.
    has_queued: bool,
    /// When each unanswered get was sent. Answers come about in this order.
    owed: VecDeque<Instant>,
    /// How long the soonest answer took.
    soonest: Duration,
}

impl Window {
    /// A window for that many gets at first, and at most.
    pub(super) fn new(least: usize, most: usize) -> Self {
        let limit = least as f64;
        let state = State { limit, has_queued: false, owed: VecDeque::new(), soonest: Duration::MAX };
        Self { room: Semaphore::new(least), least, most, state: Mutex::new(state) }
    }

    /// Waits until another get may be sent.
    pub(super) async fn room(&self) -> SemaphorePermit<'_> {
        self.room.acquire().await.expect("it is never closed")
    }

    /// Room for another get, if there is some.
    #[cfg(test)]
    pub(super) fn try_room(&self) -> Option<SemaphorePermit<'_>> {
        self.room.try_acquire().ok()
    }

    /// A get is sent that room was found for.
    pub(super) fn ask(&self, room: SemaphorePermit<'_>, now: Instant) {
        room.forget();
        lock(&self.state).owed.push_back(now);
    }

    /// A get was answered.
    pub(super) fn answered(&self, now: Instant) {
        let mut state = lock(&self.state);
        let Some(asked) = state.owed.pop_front() else { return };
        let took = now.saturating_duration_since(asked);
        state.soonest = state.soonest.min(took);
        let before = state.limit as usize;
        let widened = if took > state.soonest + QUEUE {
            state.has_queued = true;
            state.limit - NARROWER
        } else {
            state.limit + if state.has_queued { 1.0 / state.limit } else { 1.0 }
        };
        state.limit = widened.clamp(self.least as f64, self.most as f64);
        self.room.add_permits(1 + state.limit as usize - before);
    }

    /// A get will not be answered.
    pub(super) fn given_up(&self) {
        if lock(&self.state).owed.pop_back().is_some() {
            self.room.add_permits(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The limit after as many answers at that rate as come in twenty seconds, each at least `rtt` after its get.
    fn limit_at(per_second: f64, rtt: f64) -> usize {
        let (window, start) = (Window::new(4, 256), Instant::now());
        let at = |seconds| start + Duration::from_secs_f64(seconds);
        let mut due = VecDeque::new();
        let (mut now, mut free) = (0.0, 0.0f64);
        while now < 20.0 {
            while let Ok(room) = window.room.try_acquire() {
                window.ask(room, at(now));
                free = free.max(now + rtt) + 1.0 / per_second;
                due.push_back(free);
            }
            now = due.pop_front().unwrap();
            window.answered(at(now));
        }
        let state = lock(&window.state);
        assert_eq!(state.limit as usize, state.owed.len() + window.room.available_permits());
        state.limit as usize
    }

    #[test]
    fn it_is_as_wide_as_the_path_is_long_and_about_half_a_second_more() {
        assert_eq!(limit_at(1.0, 0.05), 4);
        for (per_second, rtt) in [(50.0, 0.05), (100.0, 0.6)] {
            let (ideal, limit) = (per_second * (rtt + 0.5), limit_at(per_second, rtt) as f64);
            assert!(limit > 0.8 * ideal && limit < 2.2 * ideal, "{limit} where {ideal} would do");
        }
        assert_eq!(limit_at(1e4, 0.3), 256);
    }

    #[test]
    fn what_is_given_up_makes_room() {
        let window = Window::new(1, 4);
        window.ask(window.room.try_acquire().unwrap(), Instant::now());
        assert!(window.room.try_acquire().is_err());
        window.given_up();
        window.given_up();
        assert_eq!(window.room.available_permits(), 1);
    }
}
