//! Threads for work that falls into parts, and that may wait while somebody trains.

use std::sync::LazyLock;

use atoll_core::team::{Job, Team};
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

/// A team on threads of its own, one per core, that stand back behind all others.
#[derive(Debug, Clone, Copy, Default)]
pub struct Crew;

/// `None` if the machine does not give us threads; then whoever asks does the work.
static POOL: LazyLock<Option<ThreadPool>> = LazyLock::new(|| {
    let builder = ThreadPoolBuilder::new().thread_name(|index| format!("crew-{index}"));
    builder.start_handler(|_| stand_back()).build().ok()
});

impl Crew {
    /// Does one piece of work on the crew's threads, which may share its parts.
    pub fn run<R: Send>(self, work: impl FnOnce() -> R + Send) -> R {
        match &*POOL {
            Some(pool) => pool.install(work),
            None => work(),
        }
    }
}

impl Team for Crew {
    fn all(&self, jobs: Vec<Job<'_>>) {
        if jobs.len() == 1 {
            jobs.into_iter().for_each(|job| job());
        } else {
            self.run(|| jobs.into_par_iter().for_each(|job| job()));
        }
    }
}

/// Lets all other threads of the machine go before this one: an inner step never waits for a codec.
pub(crate) fn stand_back() {
    #[cfg(target_os = "linux")]
    {
        const NICE: i32 = 10;
        // In Linux a thread has a priority of its own.
        if let Err(error) = rustix::process::setpriority_process(Some(rustix::thread::gettid()), NICE) {
            tracing::debug!("a thread cannot lower its priority: {error}");
        }
    }
}
