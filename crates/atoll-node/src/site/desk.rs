//! The desk: a thread that encodes contributions and takes in commits while the engine trains. It owns the site's
//! copies of the model; the trainer only copies the engine's weights out and adds changes, between two steps.

use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use atoll_core::codec::Codec;
use atoll_core::delta::{Change, DeltaError, Local, Payload};
use atoll_core::hash::Digest;
use atoll_core::journal::Notice;
use atoll_core::manifest::FragmentId;
use atoll_core::team::Team;

use super::net::Incoming;
use super::residuals::Residuals;
use super::toll;
use crate::coordinator::lock;
use crate::crew::stand_back;

/// Something to do with weights. Jobs are done one after the other.
pub(super) enum Job {
    /// Take up what earlier processes have left, given the last contributions in the model.
    Recall(Vec<Option<Digest>>),
    /// Encode what these weights have learnt.
    Contribute(FragmentId, Vec<f32>, Codec),
    /// The last contribution is in the model.
    Delivered(FragmentId),
    /// Give up a refused contribution's work.
    Rebase(FragmentId),
    /// Apply a commit's payload.
    Commit(Notice, Vec<u8>),
    /// Start over from these weights.
    Install(FragmentId, u64, Vec<f32>),
    /// Hand out a copy of Θ.
    Lend(mpsc::Sender<Vec<Vec<f32>>>),
    /// Keep what is not delivered, unless the run is finished; nothing comes after it.
    Close(bool, mpsc::Sender<()>),
}

/// What came of a job.
pub(super) enum Done {
    Contributed(FragmentId, Result<Payload, DeltaError>),
    Rebased(FragmentId, Change),
    /// A version with its digest; without a change if it could not be applied.
    Applied(FragmentId, u64, Digest, Option<Change>),
}

/// The clerk's end.
pub(super) struct Desk {
    jobs: mpsc::Sender<Job>,
    spent: Arc<Mutex<Spent>>,
}

/// Where the time went.
#[derive(Default)]
struct Spent {
    /// All in all.
    busy: Duration,
    /// Usual seconds for one fragment.
    encoding: f64,
    decoding: f64,
}

impl Desk {
    /// Starts the thread. It ends when the desk is dropped.
    pub(super) fn open(
        local: Local,
        residuals: Residuals,
        team: Box<dyn Team + Send>,
        inbox: mpsc::Sender<Incoming>,
    ) -> Result<Self> {
        let (jobs, queue) = mpsc::channel();
        let spent = Arc::new(Mutex::new(Spent::default()));
        let notes = spent.clone();
        let worker = move || {
            stand_back();
            work(local, residuals, &*team, &queue, &inbox, &notes);
        };
        std::thread::Builder::new().name("desk".to_string()).spawn(worker)?;
        Ok(Self { jobs, spent })
    }

    /// Puts a job on the desk.
    ///
    /// # Errors
    /// If the thread has died.
    pub(super) fn put(&self, job: Job) -> Result<()> {
        self.jobs.send(job).map_err(|_| anyhow!("the thread that encodes and applies weights has stopped"))
    }

    /// A copy of Θ, after all jobs before.
    ///
    /// # Errors
    /// If the thread has died.
    pub(super) fn lend(&self) -> Result<Vec<Vec<f32>>> {
        let (sender, answer) = mpsc::channel();
        self.put(Job::Lend(sender))?;
        Ok(answer.recv()?)
    }

    /// Keeps what is not delivered for the next process, unless the run is finished.
    ///
    /// # Errors
    /// If the thread has died.
    pub(super) fn close(&self, finished: bool) -> Result<()> {
        let (sender, answer) = mpsc::channel();
        self.put(Job::Close(finished, sender))?;
        Ok(answer.recv()?)
    }

    /// Time in which there was something on the desk.
    pub(super) fn busy(&self) -> Duration {
        lock(&self.spent).busy
    }

    /// Usual seconds of encoding one fragment and decoding one.
    pub(super) fn coding_seconds(&self) -> f64 {
        let spent = lock(&self.spent);
        spent.encoding + spent.decoding
    }
}

fn work(
    mut local: Local,
    mut residuals: Residuals,
    team: &dyn Team,
    queue: &mpsc::Receiver<Job>,
    inbox: &mpsc::Sender<Incoming>,
    spent: &Mutex<Spent>,
) {
    while let Ok(job) = queue.recv() {
        let began = Instant::now();
        let done = match job {
            Job::Recall(delivered) => {
                residuals.recall(&mut local, &delivered);
                None
            }
            Job::Contribute(fragment, weights, codec) => {
                let payload = local.contribute(fragment, weights, codec, team);
                toll::note(&mut lock(spent).encoding, began.elapsed());
                if let Ok(payload) = &payload {
                    residuals.sent(fragment, &payload.bytes);
                }
                Some(Done::Contributed(fragment, payload))
            }
            Job::Delivered(fragment) => {
                local.delivered(fragment);
                residuals.settled(&local, fragment);
                None
            }
            Job::Rebase(fragment) => {
                let change = local.rebase(fragment);
                residuals.settled(&local, fragment);
                Some(Done::Rebased(fragment, change))
            }
            Job::Commit(notice, payload) => {
                let result = local.commit(notice.fragment, payload, team);
                toll::note(&mut lock(spent).decoding, began.elapsed());
                Some(applied(notice.fragment, notice.version, result))
            }
            Job::Install(fragment, version, weights) => {
                Some(applied(fragment, version, local.install(fragment, weights)))
            }
            Job::Lend(answer) => {
                let _ = answer.send(local.thetas()); // Whoever asked may have stopped.
                continue;
            }
            Job::Close(finished, answer) => {
                residuals.close(&local, finished);
                let _ = answer.send(()); // Whoever asked may have stopped.
                return;
            }
        };
        lock(spent).busy += began.elapsed();
        if done.is_some_and(|done| inbox.send(Incoming::Worked(done)).is_err()) {
            return;
        }
    }
}

/// What cannot be applied has no digest, so the machine fetches the fragment anew.
fn applied(fragment: FragmentId, version: u64, result: Result<(Digest, Change), DeltaError>) -> Done {
    match result {
        Ok((digest, change)) => Done::Applied(fragment, version, digest, Some(change)),
        Err(error) => {
            tracing::warn!("version {version} cannot be applied: {error}; it is fetched anew");
            Done::Applied(fragment, version, Digest::default(), None)
        }
    }
}
