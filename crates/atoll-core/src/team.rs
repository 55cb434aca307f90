//! Work that falls into independent parts. What the parts compute does not depend on who computes them, so this
//! crate stays free of threads: a shell brings them as a [`Team`].

/// One part of some work.
pub type Job<'a> = Box<dyn FnOnce() + Send + 'a>;

/// Somebody who does jobs, in any order and at the same time if it likes.
pub trait Team: Sync {
    /// Does all of `jobs` before it returns.
    fn all(&self, jobs: Vec<Job<'_>>);
}

/// Does one job after the other.
#[derive(Debug, Clone, Copy, Default)]
pub struct Alone;

impl Team for Alone {
    fn all(&self, jobs: Vec<Job<'_>>) {
        jobs.into_iter().for_each(|job| job());
    }
}
