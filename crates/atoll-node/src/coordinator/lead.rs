//! How a coordinator comes to lead. Without an object store it does once it holds the run folder. With one it follows the
//! journal there, computes every commit as it comes, and leads when nobody else does: it then has everything at hand.

use std::collections::BTreeMap;
use std::fs;
use std::net::TcpListener;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use atoll_core::hash::Digest;
use atoll_core::journal::{Book, Chain, Commit, Entry};
use atoll_core::outer::Global;
use atoll_core::vigil::Vigil;
use ring::rand::{SecureRandom, SystemRandom};

use super::donor::Donor;
use super::{Clock, Options, Prepared, first_weights, lock};
use crate::journal::JournalFile;
use crate::objects::StoreFailed;
use crate::report::Report;
use crate::run::{RunDir, write_atomically};
use crate::shared::{Beat, Published, Shared, State, is_fetching};
use crate::snapshot::{self, Recovered};
use crate::store::Store;

/// What came of waiting for the lead.
pub(super) enum Turn {
    /// This coordinator leads, in this state, as that holder; sites reach it here.
    Lead(Box<Recovered>, Digest, TcpListener),
    /// It was stopped before.
    Stopped,
    /// The run was finished before.
    Finished,
}

/// Seconds between two looks at the journal in the store.
const LOOK: Duration = Duration::from_millis(250);
/// After something that may go better later.
const TRY_AGAIN: Duration = Duration::from_secs(2);
/// Between two attempts to listen while standing by.
const TRY_AGAIN_TO_OPEN: Duration = Duration::from_secs(60);
/// Between two writings of a standby's `status.json`.
const STATUS: Duration = Duration::from_millis(500);

/// Waits until this coordinator leads, following whoever does. Blocks.
///
/// # Errors
/// If another leads and this is no standby, or folder or store are unsound.
pub(super) fn take_the_lead(
    prepared: &Prepared,
    store: &Store,
    shared: Option<&Arc<Shared>>,
    listener: TcpListener,
    options: &Options,
    is_stopped: &dyn Fn() -> bool,
) -> Result<Turn> {
    let Some(shared) = shared else {
        let recovered = recover(prepared, store)?.map_or_else(|| begin(prepared), Ok)?;
        return Ok(Turn::Lead(Box::new(recovered), Digest::default(), listener));
    };
    drop(listener); // Until this one leads, or gives; sites that find nobody here look elsewhere.
    check(shared, options)?;
    match open(prepared, store, shared, options, is_stopped)? {
        Some(state) => Standby::new(prepared, store, shared, state)?.wait(options, is_stopped),
        None => Ok(Turn::Stopped),
    }
}

/// Listens at that address.
///
/// # Errors
/// If it is not to be had.
pub(super) fn bind(listen: &str) -> Result<TcpListener> {
    TcpListener::bind(listen).with_context(|| {
        format!("the address {listen} cannot be listened on\nhint: is another process using the port? choose one with --listen")
    })
}

fn recover(prepared: &Prepared, store: &Store) -> Result<Option<Recovered>> {
    let Prepared { dir, model, manifest, config, .. } = prepared;
    snapshot::recover(dir, model, manifest, config.seed, store)
}

/// Looks whether the store keeps two coordinators apart.
fn check(shared: &Shared, options: &Options) -> Result<()> {
    let place = shared.objects().place();
    if shared.objects().keeps_the_first()? {
        return Ok(());
    }
    if options.standby {
        bail!(
            "the object store {place} puts an object in place of another when it must not, so it cannot keep two coordinators apart\nhint: a standby needs a store with conditional puts (If-None-Match): a folder, S3 and most of what speaks like it, OSS or COS"
        );
    }
    tracing::warn!("{place} cannot keep two coordinators apart; see to it that there is only one");
    Ok(())
}

/// What is in the run folder, or in the store if there is nothing, or a run that begins here; none if it was stopped.
fn open(
    prepared: &Prepared,
    store: &Store,
    shared: &Shared,
    options: &Options,
    is_stopped: &dyn Fn() -> bool,
) -> Result<Option<Recovered>> {
    let dir = &prepared.dir;
    let local = if is_fetching(dir) { None } else { recover(prepared, store)? };
    let has_begun = shared.has_begun()?;
    match local {
        Some(local) if has_begun => Ok(Some(local)),
        Some(local) if local.book.epoch > 0 && !options.new_store => bail!(
            "the object store {} is empty, but the run in {} was led from one before\nhint: is coordinator.store right, and the bucket the same? If the store is to be another one, say --new-store",
            shared.objects().place(),
            dir.0.display()
        ),
        Some(_) if options.standby => bail!(
            "the object store {} is empty, and {} holds a run\nhint: start this coordinator without --standby, and it puts the run there",
            shared.objects().place(),
            dir.0.display()
        ),
        Some(local) => {
            put_payloads(&local, store, shared)?;
            publish_all(dir, shared).map(|()| Some(local))
        }
        None if !has_begun && !options.standby => {
            let begun = begin(prepared)?;
            publish_all(dir, shared).map(|()| Some(begun))
        }
        _ => fetch(prepared, store, shared, is_stopped),
    }
}

/// Puts what the commits behind the newest snapshot have merged.
fn put_payloads(local: &Recovered, store: &Store, shared: &Shared) -> Result<()> {
    for digest in local.payloads.values().flatten() {
        if let Some(bytes) = store.get(*digest) {
            shared.put_payload(*digest, &bytes)?;
        }
    }
    Ok(())
}

/// Puts the whole journal into an empty store.
fn publish_all(dir: &RunDir, shared: &Shared) -> Result<()> {
    let lines = fs::read_to_string(dir.journal()).context("the journal cannot be read")?;
    match shared.publish(1, &lines)? {
        Published::Ours => Ok(()),
        Published::Taken => bail!(
            "another run began in the object store {}\nhint: give each run a prefix of its own in coordinator.store",
            shared.objects().place()
        ),
    }
}

/// Fetches the newest snapshot, once there is one. A fresh process never makes up a run of its own here.
fn fetch(
    prepared: &Prepared,
    store: &Store,
    shared: &Shared,
    is_stopped: &dyn Fn() -> bool,
) -> Result<Option<Recovered>> {
    let mut told = false;
    while !is_stopped() {
        match shared.fetch_snapshot(&prepared.dir) {
            Ok(Some(entries)) => {
                tracing::info!("fetched the snapshot after {entries} entries from {}", shared.objects().place());
                return recover(prepared, store);
            }
            Ok(None) => {}
            // It may have been dropped for a newer one while it was fetched; what has arrived is used for that.
            Err(error) => {
                tracing::warn!("{error:#}; trying on");
                std::thread::sleep(TRY_AGAIN);
            }
        }
        if !told {
            tracing::info!("waiting for the first snapshot in {}", shared.objects().place());
            told = true;
        }
        std::thread::sleep(LOOK);
    }
    Ok(None)
}

/// The first entries and the first snapshot of a run.
fn begin(prepared: &Prepared) -> Result<Recovered> {
    let Prepared { dir, config, model, manifest, .. } = prepared;
    let global = Global::new(manifest.clone(), manifest.gather(&first_weights(dir, config, model)?));
    let began = Entry::Began {
        run: config.name.clone(),
        seed: config.seed,
        context: config.training.context as u64,
        layout: manifest.fingerprint(),
        theta: global.digests(),
    };
    let mut book = Book::default();
    book.apply(&began).map_err(|error| anyhow!("{error}"))?;
    // The snapshot comes first: a journal without one could not be understood.
    let mut chain = Chain::default();
    let line = chain.write(&began);
    snapshot::save(dir, model, &global, &book, chain, line.len() as u64 + 1)?;
    let mut journal = JournalFile::open(&dir.journal(), 0, Chain::default(), |_| bail!("the run has begun before"))?;
    journal.append(&[began])?;
    Ok(Recovered { journal, book, global: Arc::new(Mutex::new(global)), payloads: BTreeMap::new() })
}

/// What came of a look.
enum Look {
    Waits,
    Finished,
    /// As this holder, reached here.
    Leads(Digest, TcpListener),
}

/// A coordinator that does not lead yet.
struct Standby<'a> {
    prepared: &'a Prepared,
    store: &'a Store,
    shared: &'a Shared,
    state: Recovered,
    vigil: Vigil,
    clock: Clock,
    /// Which process led from this folder last: it is dead, since this one holds the folder.
    predecessor: Option<Digest>,
    /// When the last snapshot was taken.
    snapshot: Instant,
    /// When the last status was written.
    status: Option<Instant>,
    /// What this one gives to sites that join.
    donor: Option<Donor>,
    /// When that was tried last.
    opened: Option<Instant>,
}

impl<'a> Standby<'a> {
    fn new(prepared: &'a Prepared, store: &'a Store, shared: &'a Shared, state: Recovered) -> Result<Self> {
        let predecessor = fs::read_to_string(holder_path(&prepared.dir)).ok().and_then(|text| text.trim().parse().ok());
        let mut standby = Self {
            prepared,
            store,
            shared,
            state,
            vigil: Vigil::default(),
            clock: Clock::new(),
            predecessor,
            snapshot: Instant::now(),
            status: None,
            donor: None,
            opened: None,
        };
        standby.join_the_journal()?;
        Ok(standby)
    }

    /// Waits until it leads. A store that fails is no reason to give up: whoever leads may be unable to do without it, too.
    fn wait(mut self, options: &Options, is_stopped: &dyn Fn() -> bool) -> Result<Turn> {
        let mut told = false;
        while !is_stopped() {
            match self.look(options, &mut told) {
                Ok(Look::Waits) => {}
                Ok(Look::Finished) => return Ok(Turn::Finished),
                Ok(Look::Leads(holder, listener)) => {
                    return Ok(Turn::Lead(Box::new(self.state), holder, listener));
                }
                Err(error) if options.standby && error.is::<StoreFailed>() => {
                    tracing::warn!("{error:#}; trying on");
                    std::thread::sleep(TRY_AGAIN);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(Turn::Stopped)
    }

    /// Follows whoever leads, and looks whether somebody does.
    fn look(&mut self, options: &Options, told: &mut bool) -> Result<Look> {
        let is_up_to_date = self.catch_up()?;
        let beat = self.shared.leader()?.filter(|beat| beat.epoch == self.state.book.epoch);
        // Entries are no sign of life: this one may be reading what somebody wrote who died since.
        self.vigil.look(self.clock.now(), beat.as_ref().map_or(0, |beat| beat.number));
        if matches!(&beat, Some(Beat { state: State::Finished, .. })) {
            while !self.catch_up()? {} // The last entries may have come since.
            return Ok(Look::Finished);
        }
        if is_up_to_date && self.is_leaderless(beat.as_ref(), options) {
            return self.take_over(options);
        }
        let leader = beat.map_or_else(|| "another coordinator".to_string(), |beat| beat.address);
        if !options.standby && self.vigil.has_seen_life() {
            bail!("the run is led by {leader}\nhint: start this one with --standby; it goes on when that one is gone");
        }
        if options.standby && !*told {
            tracing::info!("standing by behind {leader}, at commit {}", self.state.book.commits());
            *told = true;
        }
        self.look_after_folder()?;
        self.open_the_door(options);
        if is_up_to_date {
            std::thread::sleep(LOOK);
        }
        Ok(Look::Waits)
    }

    /// Begins to give what is here, unless it does already or its address is another's meanwhile.
    fn open_the_door(&mut self, options: &Options) {
        if self.donor.is_some() || self.opened.is_some_and(|at| at.elapsed() < TRY_AGAIN_TO_OPEN) {
            return;
        }
        match Donor::open(self.prepared, &options.listen, &self.state, self.store) {
            Ok(donor) => self.donor = Some(donor),
            Err(error) if self.opened.is_none() => {
                tracing::info!("sites that join get nothing from this standby: {error:#}");
            }
            Err(_) => {}
        }
        self.opened = Some(Instant::now());
    }

    /// Leads, unless its address is taken, somebody was faster, or the leader lives after all.
    fn take_over(&mut self, options: &Options) -> Result<Look> {
        (self.donor, self.opened) = (None, None);
        // Before the claim: whoever cannot be reached must push nobody aside.
        let listener = match bind(&options.listen) {
            Ok(listener) => listener,
            Err(error) => {
                tracing::warn!("{error:#}; trying on");
                std::thread::sleep(TRY_AGAIN);
                return Ok(Look::Waits);
            }
        };
        let holder = self.claim()?;
        Ok(holder.map_or(Look::Waits, |holder| Look::Leads(holder, listener)))
    }

    fn is_leaderless(&self, beat: Option<&Beat>, options: &Options) -> bool {
        let book = &self.state.book;
        let was_here = book.leader.is_some() && book.leader == self.predecessor;
        let never_led = book.epoch == 0 && !options.standby;
        let has_stopped = beat.is_some_and(|beat| beat.state == State::Stopped);
        was_here || never_led || has_stopped || self.vigil.is_over()
    }

    /// Says in the journal that it leads, if nobody else has said anything meanwhile.
    fn claim(&mut self) -> Result<Option<Digest>> {
        let mut random = [0; 32];
        SystemRandom::new().fill(&mut random).map_err(|_| anyhow!("the system gives no randomness"))?;
        let holder = Digest(random);
        // Before the claim: should this process die right after it, the next one knows that it was here.
        write_atomically(&holder_path(&self.prepared.dir), holder.to_string().as_bytes())?;
        let book = &mut self.state.book;
        let leads = Entry::Leads { epoch: book.epoch + 1, holder };
        let lines = self.state.journal.lines(std::slice::from_ref(&leads));
        if self.shared.publish(book.entries + 1, &lines.text)? == Published::Taken {
            return Ok(None);
        }
        self.state.journal.write(&lines)?;
        book.apply(&leads).map_err(|error| anyhow!("{error}"))?;
        tracing::info!("this coordinator leads now, in epoch {}", book.epoch);
        Ok(Some(holder))
    }

    // ---- the journal ----

    /// Finds where the folder's journal goes on in the store: perhaps amid a segment.
    fn join_the_journal(&mut self) -> Result<()> {
        let (here, folder) = (self.state.book.entries, self.prepared.dir.0.display());
        match self.shared.rest_behind(here)? {
            Some((line, _)) if !self.state.journal.chain.ends_with(&line) => bail!(
                "the journal in {folder} and the one in the object store tell different things\nhint: after a rollback the run needs an empty prefix in coordinator.store, and --new-store once; else put this folder aside and begin with run.toml, tokenizer.json and coordinator.key"
            ),
            Some((_, rest)) if rest.is_empty() => Ok(()),
            Some((_, rest)) => self.take(rest),
            None => bail!(
                "the journal in {folder} has {here} entries, and the object store does not have all of them\nhint: is coordinator.store right? If the store lost some, say --new-store with an empty prefix"
            ),
        }
    }

    /// Takes what came since, for as long as until the next look; true if that is all. Behind a leader that is faster than this one
    /// it never is, and whoever follows must see all the same what else happens.
    fn catch_up(&mut self) -> Result<bool> {
        let began = Instant::now();
        while began.elapsed() < LOOK {
            let Some(text) = self.shared.segment(self.state.book.entries + 1)? else { return Ok(true) };
            self.take(text)?;
        }
        Ok(false)
    }

    fn take(&mut self, text: String) -> Result<()> {
        let understood = self.state.journal.understand(text);
        let (lines, entries) = understood.with_context(|| {
            format!(
                "the journal in {} is not the beginning of the one in the object store\nhint: stand by in a folder with run.toml, tokenizer.json and coordinator.key only",
                self.prepared.dir.0.display()
            )
        })?;
        if !self.has_payloads(&entries)? {
            return self.begin_anew();
        }
        for entry in &entries {
            let Recovered { book, global, payloads, .. } = &mut self.state;
            if let Entry::Committed(commit) = entry {
                snapshot::replay(&mut lock(global), commit, self.store)?;
                payloads.insert(book.entries + 1, snapshot::addresses(commit));
                self.donor.iter().for_each(|donor| donor.committed(commit));
            }
            book.apply(entry)
                .map_err(|error| anyhow!("the journal in the object store contradicts itself: {error}"))?;
        }
        self.donor.iter().for_each(|donor| donor.follow(&self.state.book));
        self.state.journal.write(&lines)
    }

    /// Fetches what the commits among `entries` merged; false if the store has dropped some of it.
    fn has_payloads(&self, entries: &[Entry]) -> Result<bool> {
        let commits =
            entries.iter().filter_map(|entry| if let Entry::Committed(commit) = entry { Some(commit) } else { None });
        for Commit { contributions, .. } in commits {
            for accepted in contributions {
                if self.store.get(accepted.payload).is_some() {
                    continue;
                }
                match self.shared.payload(accepted.payload)? {
                    Some(bytes) => self.store.put(accepted.payload, &bytes)?,
                    None => return Ok(false),
                }
            }
        }
        Ok(true)
    }

    /// What is here is too far behind to be followed by commits: takes the newest snapshot instead.
    fn begin_anew(&mut self) -> Result<()> {
        let newest = self.shared.snapshots()?.pop().filter(|entries| *entries > self.state.book.entries);
        if newest.is_none() {
            tracing::warn!(
                "a contribution is missing in the object store {}; waiting for a newer snapshot there",
                self.shared.objects().place()
            );
            std::thread::sleep(TRY_AGAIN);
            return Ok(());
        }
        tracing::info!("too far behind; fetching the newest snapshot");
        (self.donor, self.opened) = (None, None); // It gives what will not be current any more.
        self.shared.fetch_snapshot(&self.prepared.dir)?;
        self.state = recover(self.prepared, self.store)?.ok_or_else(|| anyhow!("the fetched snapshot holds no run"))?;
        self.join_the_journal()
    }

    // ---- the folder ----

    /// Keeps the folder fit for a quick start, and says what this is.
    fn look_after_folder(&mut self) -> Result<()> {
        let Prepared { dir, config, model, .. } = self.prepared;
        let Recovered { journal, book, global, payloads } = &mut self.state;
        if self.snapshot.elapsed().as_secs_f64() > config.coordinator.snapshot_seconds {
            let global = lock(global).clone(); // It may be asked for meanwhile.
            snapshot::save(dir, model, &global, book, journal.chain, journal.offset)?;
            let unneeded = snapshot::retire(dir, &config.coordinator, payloads, book);
            unneeded.iter().for_each(|digest| self.store.remove(*digest));
            self.snapshot = Instant::now();
        }
        if self.status.is_some_and(|at| at.elapsed() < STATUS) {
            return Ok(());
        }
        self.status = Some(Instant::now());
        let report = Report {
            run: book.run.clone(),
            state: "standby".to_string(),
            parameters: self.prepared.manifest.parameters() as u64,
            tokens: book.tokens,
            commits: book.commits(),
            digest: book.digest(),
            seconds: book.seconds,
            at: self.clock.now().0 as f64 / 1e6,
            given: self.donor.as_ref().map_or(0, Donor::given),
            ..Report::default()
        };
        write_atomically(&dir.status(), &serde_json::to_vec_pretty(&report)?)
    }
}

fn holder_path(dir: &RunDir) -> std::path::PathBuf {
    dir.0.join(".holder")
}
