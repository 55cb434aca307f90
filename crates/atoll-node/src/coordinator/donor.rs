//! What a coordinator gives while it stands by: the weights that it has come to, to sites that join. Those ask whoever leads
//! and all who stand by for different pieces at the same time, and whoever answers faster is asked for more (`site/donors.rs`).
//! Everything is named by its hash, so a donor need not be trusted: one that is behind costs a site a question, and one that gives what is
//! damaged gives nothing more.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use anyhow::Result;
use atoll_core::hash::Digest;
use atoll_core::journal::{Book, Commit, Role};
use atoll_core::site::SiteId;
use atoll_core::wire::{Purpose, Welcome};
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch as signal};
use tokio::task::JoinHandle;

use super::arriving::Arriving;
use super::gate::{self, House, Input};
use super::members::off_the_list;
use super::shelf::{Shelf, lock};
use super::{Prepared, bind};
use crate::identity::Identity;
use crate::link::Gate;
use crate::run::Terms;
use crate::snapshot::Recovered;
use crate::store::Store;

/// A standby's open door. Dropping it closes it.
pub(super) struct Donor {
    shelf: Arc<Shelf>,
    guests: Arc<Mutex<Guests>>,
    off_the_list: signal::Sender<BTreeSet<Digest>>,
    given: Arc<AtomicU64>,
    server: JoinHandle<()>,
    doorman: JoinHandle<()>,
}

/// Who is let in, and what they are told.
struct Guests {
    by_key: BTreeMap<Digest, SiteId>,
    run: String,
    epoch: u64,
    terms: String,
    layout: Digest,
    tokenizer: (Digest, u64),
}

impl Donor {
    /// Opens the door at that address.
    ///
    /// # Errors
    /// If the address is not to be had.
    pub(super) fn open(prepared: &Prepared, listen: &str, state: &Recovered, store: &Store) -> Result<Self> {
        let listener = bind(listen)?;
        listener.set_nonblocking(true)?;
        let listener = TcpListener::from_std(listener)?;
        let identity = Identity::load(&prepared.dir.key())?;
        let current = state.book.fragments.iter().map(|fragment| fragment.digest).collect();
        let tokenizer = prepared.tokenizer.json().to_vec();
        let shelf = Arc::new(Shelf::new(state.global.clone(), store.clone(), tokenizer, current));
        let guests = Arc::new(Mutex::new(Guests::new(prepared, &shelf, &state.book)?));
        let off_the_list = signal::Sender::new(off_the_list(&state.book));
        let given = Arc::new(AtomicU64::new(0));
        let (inputs, incoming) = mpsc::channel(64);
        let house = House {
            gate: Gate::new(&identity)?,
            inputs,
            shelf: shelf.clone(),
            store: store.clone(),
            shared: None,
            fragment_lens: Vec::new(),
            arriving: Arriving::new(&[]),
            links: Default::default(),
            lobby: Arc::default(),
            rooms: gate::Rooms::default(),
            outgoings: Arc::default(),
            off_the_list: off_the_list.subscribe(),
            given: given.clone(),
        };
        let doorman = tokio::spawn(let_in(incoming, guests.clone()));
        let server = tokio::spawn(gate::serve(Arc::new(house), listener));
        Ok(Self { shelf, guests, off_the_list, given, server, doorman })
    }

    /// Notes what the standby has read.
    pub(super) fn follow(&self, book: &Book) {
        let by_key = list(book);
        let mut guests = lock(&self.guests);
        if guests.by_key != by_key {
            guests.by_key = by_key;
            self.off_the_list.send_replace(off_the_list(book));
        }
        guests.epoch = book.epoch;
    }

    /// Notes that a commit was computed.
    pub(super) fn committed(&self, commit: &Commit) {
        self.shelf.committed(commit.fragment.index(), commit.digest);
    }

    /// Bytes of weights that were given.
    pub(super) fn given(&self) -> u64 {
        self.given.load(Ordering::Relaxed)
    }
}

impl Drop for Donor {
    /// Waits until the address is free for whoever leads next: this coordinator, perhaps.
    fn drop(&mut self) {
        self.doorman.abort();
        self.server.abort();
        let _ = Handle::current().block_on(&mut self.server); // It was aborted, which is no news.
    }
}

/// Lets members in who want to fetch something. All others find the door shut: whoever wants to be led must look elsewhere.
async fn let_in(mut incoming: mpsc::Receiver<Input>, guests: Arc<Mutex<Guests>>) {
    while let Some(input) = incoming.recv().await {
        let Input::Knock(knock) = input else { continue };
        let welcome = lock(&guests).welcome(knock.key);
        if let Some(welcome) = welcome.filter(|_| knock.hello.purpose == Purpose::Fetch) {
            let _ = knock.reply.send(Ok(welcome)); // The peer may have hung up meanwhile.
        }
    }
}

impl Guests {
    fn new(prepared: &Prepared, shelf: &Shelf, book: &Book) -> Result<Self> {
        Ok(Self {
            by_key: list(book),
            run: book.run.clone(),
            epoch: book.epoch,
            terms: serde_json::to_string(&Terms::of(&prepared.config, &prepared.model))?,
            layout: prepared.manifest.fingerprint(),
            tokenizer: shelf.tokenizer(),
        })
    }

    fn welcome(&self, key: Digest) -> Option<Welcome> {
        let site = self.by_key.get(&key)?.clone();
        let (run, config, (tokenizer, tokenizer_bytes)) = (self.run.clone(), self.terms.clone(), self.tokenizer);
        // What keys there are is for whoever leads to say.
        let (layout, epoch, keys) = (self.layout, self.epoch, Vec::new());
        Some(Welcome { run, site, config, layout, tokenizer, tokenizer_bytes, session: 0, epoch, keys })
    }
}

/// Keys of sites that may train.
fn list(book: &Book) -> BTreeMap<Digest, SiteId> {
    let members = book.sites.iter().filter(|(_, member)| member.role == Role::Train);
    let keys = members.map(|(site, member)| (member.key, site.clone()));
    keys.filter(|(key, _)| !book.is_off_the_list(*key)).collect()
}
