//! Threads that wait for the next pass by spinning a moment before they sleep. A step is a chain of
//! passes, each a few microseconds to milliseconds long; a general pool would put its threads to bed in
//! between. What a pass works on is an ordinary iterator behind a lock: whoever is free takes the next item.
//!
//! ```
//! # use atoll_cpu::Pool;
//! let (pool, mut squares) = (Pool::new(2), vec![0; 1000]);
//! pool.each(squares.chunks_mut(64).enumerate(), |(chunk, squares)| {
//!     squares.iter_mut().zip(chunk * 64..).for_each(|(square, x)| *square = x * x);
//! });
//! assert_eq!(squares[999], 998_001);
//! ```
#![allow(unsafe_code)]

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle, Thread};

/// Looks at the next pass before a thread sleeps: some tens of microseconds.
const SPINS: usize = 4000;

/// Some threads, of which the caller is one.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Held by the caller whose pass runs.
    turn: Mutex<()>,
}

/// What the caller and its workers both see.
#[derive(Default)]
struct Shared {
    /// Passes begun; a worker that has seen fewer looks for `pass`.
    begun: AtomicUsize,
    /// Workers that are not done with the present pass.
    busy: AtomicUsize,
    stop: AtomicBool,
    pass: Mutex<Option<Pass>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// A pass, and who waits for its end.
#[derive(Clone)]
struct Pass {
    /// Lives until `busy` is 0, see [`Pool::broadcast`].
    work: &'static (dyn Fn() + Sync),
    caller: Thread,
}

impl Pool {
    /// A pool of that many threads; 0 takes one per core.
    pub fn new(threads: usize) -> Self {
        let threads = if threads == 0 { thread::available_parallelism().map_or(1, usize::from) } else { threads };
        let shared = Arc::new(Shared::default());
        let spawn = || {
            let shared = shared.clone();
            thread::Builder::new().name("atoll-cpu".to_string()).spawn(move || shared.serve())
        };
        // Where the system gives fewer threads, fewer will do.
        let workers = (1..threads).map_while(|_| spawn().ok()).collect();
        Self { shared, workers, turn: Mutex::new(()) }
    }

    /// Threads, with the caller.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `work` with every item, on all threads; returns when all is done. `work` must not begin another
    /// pass on the same pool.
    pub fn each<I>(&self, items: I, work: impl Fn(I::Item) + Sync)
    where
        I: Iterator + Send,
        I::Item: Send,
    {
        self.each_with(&mut vec![(); self.threads()], items, |(), item| work(item));
    }

    /// The same, with something of its own for each thread, such as scratch memory: one per thread.
    pub fn each_with<I, S: Send>(&self, own: &mut [S], items: I, work: impl Fn(&mut S, I::Item) + Sync)
    where
        I: Iterator + Send,
        I::Item: Send,
    {
        assert!(!own.is_empty(), "something for at least one thread");
        let (own, items) = (Mutex::new(own.iter_mut()), Mutex::new(items));
        self.broadcast(&|| {
            let Some(own) = lock(&own).next() else { return };
            loop {
                let item = lock(&items).next();
                match item {
                    Some(item) => work(own, item),
                    None => break,
                }
            }
        });
    }

    /// Runs `work` on every thread at once. A panic of one is passed on when all are done.
    fn broadcast(&self, work: &(dyn Fn() + Sync)) {
        let _turn = lock(&self.turn);
        // SAFETY: only the lifetime changes. Workers use `work` between `begun` and `busy == 0`, and
        // this function does not return, not even by a panic, before `busy` is 0 and `pass` is empty.
        let work: &'static (dyn Fn() + Sync) = unsafe { std::mem::transmute(work) };
        *lock(&self.shared.pass) = Some(Pass { work, caller: thread::current() });
        self.shared.busy.store(self.workers.len(), Ordering::Release);
        self.shared.begun.fetch_add(1, Ordering::Release);
        self.workers.iter().for_each(|worker| worker.thread().unpark());
        let own = catch_unwind(AssertUnwindSafe(work));
        wait_until(|| self.shared.busy.load(Ordering::Acquire) == 0);
        *lock(&self.shared.pass) = None;
        let theirs = lock(&self.shared.panic).take();
        if let Some(panic) = own.err().or(theirs) {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches the panics of its passes, so it has none of its own to report.
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// A worker's life.
    fn serve(&self) {
        let mut seen = 0;
        loop {
            wait_until(|| self.begun.load(Ordering::Acquire) != seen || self.stop.load(Ordering::Acquire));
            if self.stop.load(Ordering::Acquire) {
                return;
            }
            seen += 1;
            let pass = lock(&self.pass).clone();
            let Pass { work, caller } = pass.expect("a pass that began is there until all are done");
            if let Err(panic) = catch_unwind(AssertUnwindSafe(work)) {
                lock(&self.panic).get_or_insert(panic);
            }
            if self.busy.fetch_sub(1, Ordering::AcqRel) == 1 {
                caller.unpark();
            }
        }
    }
}

/// Returns once `done`: looks often, then sleeps until somebody unparks this thread.
fn wait_until(done: impl Fn() -> bool) {
    for _ in 0..SPINS {
        if done() {
            return;
        }
        std::hint::spin_loop();
    }
    while !done() {
        thread::park();
    }
}

/// A panicking pass leaves nothing half done in what these locks guard.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_is_taken_once_by_any_number_of_threads() {
        for threads in [1, 2, 3, 7] {
            let pool = Pool::new(threads);
            for len in [0, 1, 5, 1000] {
                let mut counts = vec![0; len];
                pool.each(counts.iter_mut(), |count| *count += 1);
                assert_eq!(counts, vec![1; len]);
            }
        }
    }

    #[test]
    fn a_panic_comes_to_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(3);
        let caught = catch_unwind(AssertUnwindSafe(|| pool.each(0..100, |x| assert_ne!(x, 57, "this one"))));
        assert!(caught.is_err());
        let sum = AtomicUsize::new(0);
        pool.each(0..100, |x| _ = sum.fetch_add(x, Ordering::Relaxed));
        assert_eq!(sum.into_inner(), 4950);
    }

    #[test]
    fn a_pool_that_slept_wakes_up() {
        let pool = Pool::new(2);
        for _ in 0..3 {
            thread::sleep(std::time::Duration::from_millis(5));
            let mut seen = [false; 8];
            pool.each(seen.iter_mut(), |seen| *seen = true);
            assert_eq!(seen, [true; 8]);
        }
    }
}
