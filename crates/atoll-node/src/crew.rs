//! Threads for work that falls into parts.

use atoll_core::team::{Job, Team};
use rayon::prelude::*;

/// A team on the process's thread pool.
#[derive(Debug, Clone, Copy, Default)]
pub struct Crew;

impl Team for Crew {
    fn all(&self, jobs: Vec<Job<'_>>) {
        if jobs.len() == 1 {
            jobs.into_iter().for_each(|job| job());
        } else {
            jobs.into_par_iter().for_each(|job| job());
        }
    }
}
