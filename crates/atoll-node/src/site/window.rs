//! How many gets may be unanswered. Where several coordinators give, none may be asked for more than it gives in a moment: what a
//! slow one owes, no other can give.

use std::sync::Mutex;
use std::time::Instant;

use anyhow::Result;
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::coordinator::lock;

/// Whoever gives may owe what it gives in so many seconds.
const SECONDS: f64 = 0.5;

/// A window that widens with the rate of answers.
pub(super) struct Window {
    room: Semaphore,
    most: usize,
    state: Mutex<State>,
}

struct State {
    limit: usize,
    owed: usize,
    /// Since there was nothing owed.
    answered: usize,
    began: Option<Instant>,
}

impl Window {
    /// A window for that many gets at first and at most.
    pub(super) fn new(first: usize, most: usize) -> Self {
        let state = State { limit: first, owed: 0, answered: 0, began: None };
        Self { room: Semaphore::new(first), most, state: Mutex::new(state) }
    }

    /// Waits until another get may be sent.
    ///
    /// # Errors
    /// Never.
    pub(super) async fn room(&self) -> Result<SemaphorePermit<'_>> {
        Ok(self.room.acquire().await?)
    }

    /// A get is sent that room was found for.
    pub(super) fn ask(&self, room: SemaphorePermit<'_>, now: Instant) {
        room.forget();
        let mut state = lock(&self.state);
        state.owed += 1;
        state.began.get_or_insert(now);
    }

    /// A get was answered.
    pub(super) fn answered(&self, now: Instant) {
        let mut state = lock(&self.state);
        state.owed = state.owed.saturating_sub(1);
        state.answered += 1;
        let seconds = state.began.map_or(0.0, |began| (now - began).as_secs_f64());
        let target = (state.answered as f64 / seconds.max(1e-3) * SECONDS) as usize;
        let limit = target.min(self.most).max(state.limit);
        self.room.add_permits(1 + limit - state.limit);
        state.limit = limit;
        if state.owed == 0 {
            (state.answered, state.began) = (0, None);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// The limit after answers at that rate, one after the other.
    fn limit_at(per_second: f64) -> usize {
        let (window, start) = (Window::new(4, 64), Instant::now());
        let at = |count: u32| start + Duration::from_secs_f64(f64::from(count) / per_second);
        let ask = |count| window.ask(window.room.try_acquire().unwrap(), at(count));
        ask(0);
        for count in 0..200 {
            ask(count);
            window.answered(at(count + 1));
        }
        let limit = lock(&window.state).limit;
        assert_eq!(window.room.available_permits(), limit - 1, "one is owed");
        limit
    }

    #[test]
    fn it_is_half_a_second_wide() {
        assert_eq!((limit_at(1.0), limit_at(60.0), limit_at(1e4)), (4, 30, 64));
    }
}
