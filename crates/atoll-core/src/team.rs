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

/// Has a team do `work` on each of `parts`, which are numbered; the results stand in the order of the parts.
pub fn share_out<P: Send, R: Send>(
    parts: impl IntoIterator<Item = P>,
    team: &dyn Team,
    work: impl Fn(usize, P) -> R + Sync,
) -> Vec<R> {
    let parts: Vec<P> = parts.into_iter().collect();
    let mut results: Vec<Option<R>> = parts.iter().map(|_| None).collect();
    let work = &work;
    let jobs = parts
        .into_iter()
        .enumerate()
        .zip(&mut results)
        .map(|((number, part), result)| Box::new(move || *result = Some(work(number, part))) as Job<'_>);
    team.all(jobs.collect());
    results.into_iter().map(|result| result.expect("a team does all of its jobs")).collect()
}
