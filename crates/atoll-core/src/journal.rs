//! The journal: the run's append-only record, and the [`Book`] that is the sum of its entries.
//!
//! Nothing is announced before its entry is durable, and the coordinator's lasting state is nothing
//! but the book, so journal and last snapshot rebuild it exactly. A commit and the tokens it brings
//! into the model are *one* entry: there is no moment at which one is true without the other.
//!
//! On disk an entry is one line: 16 hexadecimal digits of a hash chained over all lines so far, a
//! space, and the entry as JSON. A line that was cut short or altered breaks the chain.

mod looks;
mod members;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

pub use looks::{Evaluated, Trial};
pub use members::{Act, Invitation, Role};
use serde::{Deserialize, Serialize};

use crate::data::{DatasetId, Ledger, LedgerError, Ranges};
use crate::hash::Digest;
use crate::manifest::FragmentId;
use crate::outer::{Recipe, guard};
use crate::plan;
use crate::site::SiteId;

/// How many commits of a fragment a site may be behind and still catch up by deltas, so that a model that was long
/// under way need not be fetched again. Sixty-four deltas of half a bit weigh as much as the `f32` weights.
pub const TAIL: usize = 64;
/// Leases of a session that are remembered; a site confirms each before it gets the next.
const LEASES: usize = 8;

/// How many settled contributions of a session are remembered at least, and for each fragment; a site never has this
/// many under way.
const SETTLED: usize = 256;
const SETTLED_PER_FRAGMENT: usize = 4;

/// One fact of the run, in the order in which facts became true.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "entry", rename_all = "snake_case")]
pub enum Entry {
    /// The run exists, with these first weights.
    Began {
        /// Its name.
        run: String,
        /// Seed of everything random in it.
        seed: u64,
        /// Tokens predicted per sample.
        context: u64,
        /// Fingerprint of the manifest.
        layout: Digest,
        /// Digest of each fragment's first weights.
        theta: Vec<Digest>,
    },
    /// A coordinator took the run over from whoever led it before. Only runs in an object store change hands; there this
    /// entry also keeps the earlier leader from ever adding one.
    Leads {
        /// One more than its predecessor's.
        epoch: u64,
        /// Which process it is, for itself to know.
        holder: Digest,
    },
    /// A one-time ticket was given out.
    Invited {
        /// Hash of its secret.
        ticket: Digest,
        /// What it is good for.
        #[serde(flatten)]
        invitation: Invitation,
        /// Which administrator did so from afar; none if it was done in the run folder.
        #[serde(default)]
        by: Option<SiteId>,
    },
    /// All unused tickets of that name were withdrawn.
    Withdrawn {
        /// The name.
        site: SiteId,
        /// Which administrator did so from afar.
        #[serde(default)]
        by: Option<SiteId>,
    },
    /// A site's key was let in with a one-time ticket.
    Admitted {
        /// The site.
        site: SiteId,
        /// Fingerprint of its public key.
        key: Digest,
        /// Hash of the ticket's secret, used up hereby.
        ticket: Digest,
        /// What it may do.
        #[serde(default)]
        role: Role,
    },
    /// A site has a new key in place of its earlier one, which is good for nothing any more.
    Rekeyed {
        /// The site.
        site: SiteId,
        /// Fingerprint of the earlier key, by which it was known when it asked for this.
        from: Digest,
        /// Fingerprint of the new one.
        to: Digest,
    },
    /// The operator took a site's key off the list for good. What the site holds goes back with an entry of its own.
    Revoked {
        /// The site.
        site: SiteId,
        /// Fingerprint of the key.
        key: Digest,
        /// Which administrator did so from afar.
        #[serde(default)]
        by: Option<SiteId>,
    },
    /// The coordinators of the run will have another key: whoever knows them by the present one is told.
    Succession {
        /// Fingerprint of the next key.
        key: Digest,
    },
    /// A site began a session; whatever an earlier session held is back in the pool.
    Joined {
        /// The site.
        site: SiteId,
        /// Grows from session to session.
        session: u64,
        /// The dataset it brings.
        dataset: DatasetId,
        /// Samples in one epoch of it.
        samples: u64,
    },
    /// Samples were leased to a site.
    Leased {
        /// The site.
        site: SiteId,
        /// Counts the leases of this session from 1.
        number: u64,
        /// The positions.
        ranges: Ranges,
    },
    /// A site's session ended; what it held is back in the pool.
    Returned {
        /// The site.
        site: SiteId,
        /// What happened, for people.
        why: String,
    },
    /// A contribution was turned down; its samples are back in the pool.
    Refused {
        /// The site.
        site: SiteId,
        /// The contribution's number.
        number: u64,
        /// The fragment that it names.
        fragment: FragmentId,
        /// Its samples, as far as the site held them.
        ranges: Ranges,
        /// Why, for people.
        why: String,
    },
    /// A fragment has a new version.
    Committed(Commit),
    /// Held-out loss of the global model.
    Evaluated(Evaluated),
    /// Contributions to a commit were tried on held-out text, each alone.
    Tried {
        /// The fragment.
        fragment: FragmentId,
        /// The version that was being made.
        version: u64,
        /// Nats per token without any of them.
        before: f64,
        /// What each of them made of it.
        contributions: Vec<Trial>,
    },
    /// The operator took the run back to an earlier commit; this journal goes on from there. Every session is over, so
    /// that sites with later weights start over.
    RolledBack {
        /// Commits that the run had.
        from: u64,
        /// Commits that it has now.
        to: u64,
        /// Hash over all lines of the journal that was set aside.
        journal: Digest,
        /// The latest session of each site there.
        sessions: BTreeMap<SiteId, u64>,
    },
    /// The run reached its goal.
    Finished,
}

/// One outer step of one fragment: everything needed to compute it again.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Commit {
    /// The fragment.
    pub fragment: FragmentId,
    /// Its new version.
    pub version: u64,
    /// What was merged, in the order of merging.
    pub contributions: Vec<Accepted>,
    /// How they were merged and Θ moved.
    pub recipe: Recipe,
    /// Content address of the broadcast payload.
    pub delta: Digest,
    /// Bytes of the broadcast payload.
    pub bytes: u64,
    /// Digest of the fragment after the commit.
    pub digest: Digest,
    /// How each contribution agreed with the others, where the guard could tell, in the order of merging.
    #[serde(default)]
    pub agreements: Vec<Option<f64>>,
    /// Seconds for which the run had been training.
    pub seconds: f64,
}

/// A contribution in a commit.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Accepted {
    /// Who made it.
    pub site: SiteId,
    /// Its number in the site's session.
    pub number: u64,
    /// Content address of its payload.
    pub payload: Digest,
    /// Version of the fragment that it set out from.
    pub base: u64,
    /// Inner steps in it.
    pub steps: u64,
    /// Tokens in it.
    pub tokens: u64,
    /// Its weight in the merge.
    pub weight: f64,
    /// Length of its pseudo-gradient.
    pub norm: f64,
    /// What its site's earlier contributions had shown.
    #[serde(default)]
    pub trust: f64,
    /// How they had helped on held-out text.
    #[serde(default)]
    pub quality: f64,
    /// The samples that enter the model with it.
    pub ranges: Ranges,
}

impl Accepted {
    /// tokens²/steps: what a contribution weighs by its work alone (Decoupled DiLoCo, arXiv 2604.21428).
    pub fn work(&self) -> f64 {
        let tokens = self.tokens as f64;
        tokens * tokens / self.steps.max(1) as f64
    }
}

/// What the next commits of a fragment look like to a site that must follow.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Notice {
    /// The fragment.
    pub fragment: FragmentId,
    /// The version that the payload leads to.
    pub version: u64,
    /// Content address of the payload.
    pub delta: Digest,
    /// Bytes of the payload.
    pub bytes: u64,
    /// Digest of the fragment after it.
    pub digest: Digest,
}

/// How a contribution ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Settled {
    /// It is part of this version of its fragment.
    Committed(u64),
    /// It is not in the model, and its samples are back in the pool.
    Refused(String),
}

/// A settled contribution.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Past {
    /// The fragment that it named.
    pub fragment: FragmentId,
    /// The samples that it named and its site held.
    pub samples: u64,
    /// How it ended.
    pub settled: Settled,
}

/// The state of one fragment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FragmentBook {
    /// Commits so far.
    pub version: u64,
    /// Digest of its weights.
    pub digest: Digest,
    /// The last commits, at most [`TAIL`].
    pub tail: VecDeque<Notice>,
    /// What each site usually brings to a commit, tokens²/steps, smoothed.
    pub usual: BTreeMap<SiteId, f64>,
    /// Length of the longest contribution so far.
    pub longest: f64,
    /// The greatest length per inner step of a contribution so far.
    #[serde(default)]
    pub fastest: f64,
    /// The payload of each site's last contribution.
    #[serde(default)]
    pub delivered: BTreeMap<SiteId, Digest>,
    /// Length and inner steps of a contribution: smoothed medians of commits with at least two, of two the lesser; 0 before.
    #[serde(default)]
    pub typical: (f64, f64),
    /// Commits that taught this.
    #[serde(default)]
    pub taught: u64,
}

/// Weight of the newest contribution in what is usual.
const USUAL_SHARE: f64 = 0.2;
/// A contribution that holds more than so many times the usual work is a backlog and counts as so many.
pub const USUAL_MAX: f64 = 2.0;

impl FragmentBook {
    fn note(&mut self, contributions: &[Accepted]) {
        for accepted in contributions {
            self.delivered.insert(accepted.site.clone(), accepted.payload);
            let usual = self.usual.entry(accepted.site.clone()).or_default();
            let most = if *usual > 0.0 { USUAL_MAX * *usual } else { f64::INFINITY };
            *usual = plan::smooth(*usual, accepted.work().min(most), USUAL_SHARE);
            self.longest = self.longest.max(accepted.norm);
            self.fastest = self.fastest.max(accepted.norm / accepted.steps.max(1) as f64);
        }
        // Of two the lesser: one of them could move any median. What one alone brings says nothing of others.
        if contributions.len() > 1 {
            let middle = |of: fn(&Accepted) -> f64| match contributions {
                [a, b] => of(a).min(of(b)),
                all => guard::upper_median(all.iter().map(of).collect()),
            };
            let (norm, steps) = (middle(|accepted| accepted.norm), middle(|accepted| accepted.steps as f64));
            self.taught += 1;
            let (usual_norm, usual_steps) = self.typical;
            self.typical = (plan::smooth(usual_norm, norm, USUAL_SHARE), plan::smooth(usual_steps, steps, USUAL_SHARE));
        }
    }
}

/// What the run knows for good about a site.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Member {
    /// Fingerprint of its public key.
    pub key: Digest,
    /// Its latest session, 0 before the first.
    pub session: u64,
    /// Whether that session is still good.
    pub open: bool,
    /// The dataset of that session.
    pub dataset: Option<DatasetId>,
    /// The latest leases of the session by number.
    pub leases: BTreeMap<u64, Ranges>,
    /// The latest settled contributions of the session by number.
    pub settled: BTreeMap<u64, Past>,
    /// Whether there were earlier ones, and the samples that these named.
    pub forgotten: Option<u64>,
    /// Contributions in the model, over all sessions.
    pub contributions: u64,
    /// Tokens in the model, over all sessions.
    pub tokens: u64,
    /// What its contributions have shown, −1 to 1; 0 if nothing.
    #[serde(default)]
    pub trust: f64,
    /// How they have helped on held-out text, −1 to 1; 0 if none was tried.
    #[serde(default)]
    pub quality: f64,
    /// What it may do.
    #[serde(default)]
    pub role: Role,
}

impl Entry {
    /// Whether it is about who leads the run and who belongs to it: that is not taken back.
    pub fn is_about_people(&self) -> bool {
        matches!(
            self,
            Self::Leads { .. }
                | Self::Invited { .. }
                | Self::Withdrawn { .. }
                | Self::Admitted { .. }
                | Self::Rekeyed { .. }
                | Self::Revoked { .. }
                | Self::Succession { .. }
        )
    }
}

impl Member {
    fn new(key: Digest) -> Self {
        Self {
            key,
            session: 0,
            open: false,
            dataset: None,
            leases: BTreeMap::new(),
            settled: BTreeMap::new(),
            forgotten: None,
            contributions: 0,
            tokens: 0,
            trust: 0.0,
            quality: 0.0,
            role: Role::default(),
        }
    }

    /// What became of a contribution of the session, if it is settled.
    pub fn outcome(&self, number: u64) -> Option<Settled> {
        let is_forgotten = self.forgotten.is_some() && self.settled.keys().next().is_some_and(|&first| number < first);
        match self.settled.get(&number) {
            Some(past) => Some(past.settled.clone()),
            // Whatever it was, the site starts over from the global model, which holds it or not.
            None if is_forgotten => Some(Settled::Refused("it was settled too long ago to be remembered".to_string())),
            None => None,
        }
    }

    /// Whether its latest contribution that is settled was refused.
    pub fn is_refused(&self) -> bool {
        let latest = self.settled.last_key_value();
        latest.is_some_and(|(_, past)| matches!(past.settled, Settled::Refused(_)))
    }
}

/// The sum of all entries: the coordinator's lasting state.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Book {
    /// Number of entries summed up.
    pub entries: u64,
    /// Name of the run; empty before it began.
    pub run: String,
    /// The run's seed.
    pub seed: u64,
    /// Tokens predicted per sample.
    pub context: u64,
    /// Fingerprint of the manifest.
    pub layout: Digest,
    /// How often a coordinator took the run over; 0 if it never left its folder.
    #[serde(default)]
    pub epoch: u64,
    /// Which process took it over last.
    #[serde(default)]
    pub leader: Option<Digest>,
    /// Fragments in order.
    pub fragments: Vec<FragmentBook>,
    /// Sites by name.
    pub sites: BTreeMap<SiteId, Member>,
    /// Tickets given out and not used yet.
    #[serde(default)]
    pub invited: BTreeMap<Digest, Invitation>,
    /// Tickets used up.
    pub tickets: BTreeSet<Digest>,
    /// Keys that were revoked, and whose they were.
    #[serde(default)]
    pub revoked: BTreeMap<Digest, SiteId>,
    /// Keys whose owners have others by now.
    #[serde(default)]
    pub replaced: BTreeMap<Digest, SiteId>,
    /// The coordinators' next key, or the present one once they have it; none if there never was another.
    #[serde(default)]
    pub successor: Option<Digest>,
    /// Which samples are in the model.
    pub ledger: Ledger,
    /// Tokens in the model.
    pub tokens: u64,
    /// Seconds of training up to the last commit.
    pub seconds: f64,
    /// First and latest held-out loss.
    pub evaluations: Option<(Evaluated, Evaluated)>,
    /// Whether the run reached its goal.
    pub finished: bool,
}

/// An entry that cannot follow what the book says: the journal is damaged or from another run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BookError {
    /// The samples do not add up.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// Something else does not follow.
    #[error("the entry does not follow: {0}")]
    OutOfOrder(String),
}

fn out_of_order<T>(what: impl Into<String>) -> Result<T, BookError> {
    Err(BookError::OutOfOrder(what.into()))
}

impl Book {
    /// Number of commits, over all fragments.
    pub fn commits(&self) -> u64 {
        self.fragments.iter().map(|fragment| fragment.version).sum()
    }

    /// Digest of the whole model.
    pub fn digest(&self) -> Digest {
        Digest::of_all(self.fragments.iter().map(|fragment| &fragment.digest))
    }

    /// The samples that `site` holds on lease.
    pub fn held(&self, site: &SiteId) -> Ranges {
        let dataset = self.sites.get(site).and_then(|member| member.dataset);
        dataset.map(|dataset| self.ledger.held(site, dataset)).unwrap_or_default()
    }

    /// Adds one entry.
    ///
    /// # Errors
    /// If the entry does not follow from what is booked; then the book must be given up.
    pub fn apply(&mut self, entry: &Entry) -> Result<(), BookError> {
        match entry {
            Entry::Began { run, seed, context, layout, theta } => self.begin(run, *seed, *context, *layout, theta)?,
            Entry::Leads { epoch, .. } if Some(*epoch) != self.epoch.checked_add(1) => {
                return out_of_order(format!("the run is in epoch {}, not before {epoch}", self.epoch));
            }
            Entry::Leads { epoch, holder } => (self.epoch, self.leader) = (*epoch, Some(*holder)),
            Entry::Invited { ticket, invitation, .. } => self.invite(*ticket, invitation)?,
            Entry::Withdrawn { site, .. } => self.withdraw(site),
            Entry::Admitted { site, key, ticket, role } => self.admit(site, *key, *ticket, *role)?,
            Entry::Rekeyed { site, from, to } => self.replace(site, *from, *to)?,
            Entry::Revoked { site, key, .. } => self.revoke(site, *key)?,
            Entry::Succession { key } => self.successor = Some(*key),
            Entry::Joined { site, session, dataset, samples } => {
                self.release_all(site)?;
                self.ledger.declare(*dataset, *samples);
                let member = self.member(site)?;
                if *session <= member.session {
                    return out_of_order(format!("{site} is past session {session}"));
                }
                (member.session, member.open, member.dataset) = (*session, true, Some(*dataset));
                member.leases.clear();
                member.settled.clear();
                member.forgotten = None;
            }
            Entry::Leased { site, number, ranges } => {
                let dataset = self.dataset(site)?;
                self.ledger.lease(site, dataset, ranges)?;
                let member = self.member(site)?;
                member.leases.insert(*number, ranges.clone());
                while member.leases.len() > LEASES {
                    member.leases.pop_first();
                }
            }
            Entry::Returned { site, .. } => {
                self.release_all(site)?;
                self.member(site)?.open = false;
            }
            Entry::Refused { site, number, fragment, ranges, why } => {
                let dataset = self.dataset(site)?;
                self.ledger.release(site, dataset, ranges)?;
                let (fragment, samples, settled) = (*fragment, ranges.len(), Settled::Refused(why.clone()));
                self.settle(site, *number, Past { fragment, samples, settled })?;
            }
            Entry::Committed(commit) => self.commit(commit)?,
            Entry::Tried { contributions, .. } => {
                for trial in contributions {
                    let member = self.member(&trial.site)?;
                    member.quality = guard::learn(member.quality, Some(trial.help));
                }
            }
            Entry::Evaluated(evaluated) => {
                let first = self.evaluations.map_or(*evaluated, |(first, _)| first);
                self.evaluations = Some((first, *evaluated));
            }
            Entry::RolledBack { to, sessions, .. } => self.roll_back(*to, sessions)?,
            Entry::Finished => self.finished = true,
        }
        self.entries += 1;
        Ok(())
    }

    fn begin(&mut self, run: &str, seed: u64, context: u64, layout: Digest, theta: &[Digest]) -> Result<(), BookError> {
        if self.entries > 0 {
            return out_of_order("the run has begun before");
        }
        (self.run, self.seed, self.context, self.layout) = (run.to_string(), seed, context, layout);
        let fragment = |&digest| FragmentBook {
            version: 0,
            digest,
            tail: VecDeque::new(),
            usual: BTreeMap::new(),
            longest: 0.0,
            fastest: 0.0,
            delivered: BTreeMap::new(),
            typical: (0.0, 0.0),
            taught: 0,
        };
        self.fragments = theta.iter().map(fragment).collect();
        Ok(())
    }

    fn roll_back(&mut self, to: u64, sessions: &BTreeMap<SiteId, u64>) -> Result<(), BookError> {
        if to != self.commits() {
            return out_of_order(format!("the run is at commit {}, not {to}", self.commits()));
        }
        let sites: Vec<SiteId> = self.sites.keys().cloned().collect();
        for site in &sites {
            self.release_all(site)?;
            let latest = sessions.get(site).copied().unwrap_or(0);
            let member = self.member(site)?;
            (member.session, member.open) = (member.session.max(latest), false);
        }
        Ok(())
    }

    fn commit(&mut self, commit: &Commit) -> Result<(), BookError> {
        let Some(fragment) = self.fragments.get(commit.fragment.index()) else {
            return out_of_order(format!("there is no {}", commit.fragment));
        };
        if Some(commit.version) != fragment.version.checked_add(1) {
            return out_of_order(format!("{} is at version {}", commit.fragment, fragment.version));
        }
        self.check_contributions(commit)?;
        for accepted in &commit.contributions {
            let dataset = self.dataset(&accepted.site)?;
            self.ledger.consume(&accepted.site, dataset, &accepted.ranges)?;
            let (samples, settled) = (accepted.ranges.len(), Settled::Committed(commit.version));
            self.settle(&accepted.site, accepted.number, Past { fragment: commit.fragment, samples, settled })?;
            let tokens = samples * self.context;
            self.tokens += tokens;
            let member = self.member(&accepted.site)?;
            member.contributions += 1;
            member.tokens += tokens;
        }
        for (accepted, agreement) in commit.contributions.iter().zip(&commit.agreements) {
            let member = self.member(&accepted.site)?;
            member.trust = guard::learn(member.trust, *agreement);
        }
        let fragment = &mut self.fragments[commit.fragment.index()];
        fragment.note(&commit.contributions);
        fragment.version = commit.version;
        fragment.digest = commit.digest;
        fragment.tail.push_back(Notice {
            fragment: commit.fragment,
            version: commit.version,
            delta: commit.delta,
            bytes: commit.bytes,
            digest: commit.digest,
        });
        while fragment.tail.len() > TAIL {
            fragment.tail.pop_front();
        }
        self.seconds = commit.seconds;
        Ok(())
    }

    /// Finds everything that could go wrong before anything is booked: a commit is booked whole or not at all.
    fn check_contributions(&self, commit: &Commit) -> Result<(), BookError> {
        let mut samples = commit.contributions.iter().map(|accepted| accepted.ranges.len());
        let samples = samples.try_fold(0u64, u64::checked_add);
        let tokens = samples.and_then(|samples| samples.checked_mul(self.context));
        if tokens.and_then(|tokens| tokens.checked_add(self.tokens)).is_none() {
            return out_of_order("there are more tokens in the model than can be counted");
        }
        for (index, accepted) in commit.contributions.iter().enumerate() {
            let Some(member) = self.sites.get(&accepted.site) else {
                return out_of_order(format!("{} was never admitted", accepted.site));
            };
            let again = |other: &Accepted| {
                other.site == accepted.site
                    && (other.number == accepted.number || other.ranges.intersects(&accepted.ranges))
            };
            if member.settled.contains_key(&accepted.number) || commit.contributions[..index].iter().any(again) {
                return out_of_order(format!(
                    "contribution {} of {} was settled before",
                    accepted.number, accepted.site
                ));
            }
            if !self.held(&accepted.site).contains(&accepted.ranges) {
                return Err(LedgerError::NotHeld { site: accepted.site.clone() }.into());
            }
        }
        Ok(())
    }

    fn settle(&mut self, site: &SiteId, number: u64, past: Past) -> Result<(), BookError> {
        let most = SETTLED.max(SETTLED_PER_FRAGMENT * self.fragments.len());
        let member = self.member(site)?;
        if member.settled.insert(number, past).is_some() {
            return out_of_order(format!("contribution {number} of {site} was settled before"));
        }
        while member.settled.len() > most
            && let Some((_, past)) = member.settled.pop_first()
        {
            member.forgotten = Some(member.forgotten.unwrap_or(0).saturating_add(past.samples));
        }
        Ok(())
    }

    fn release_all(&mut self, site: &SiteId) -> Result<(), BookError> {
        if let Some(dataset) = self.member(site)?.dataset {
            let held = self.ledger.held(site, dataset);
            self.ledger.release(site, dataset, &held)?;
        }
        Ok(())
    }

    fn member(&mut self, site: &SiteId) -> Result<&mut Member, BookError> {
        self.sites.get_mut(site).ok_or_else(|| BookError::OutOfOrder(format!("{site} was never admitted")))
    }

    fn dataset(&mut self, site: &SiteId) -> Result<DatasetId, BookError> {
        let dataset = self.member(site)?.dataset;
        dataset.ok_or_else(|| BookError::OutOfOrder(format!("{site} has not joined")))
    }
}

/// The running hash of a journal's lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Chain(pub Digest);

/// A line that is not the next line of this journal.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LineError {
    /// Hash and text do not belong together, or not in this place.
    #[error("its hash does not continue the chain")]
    Chain,
    /// The text is no entry.
    #[error("it is no entry: {0}")]
    Entry(String),
}

impl Chain {
    /// The line, without its newline, that records `entry` after all lines so far.
    ///
    /// # Panics
    /// Never: entries hold nothing that JSON cannot say.
    pub fn write(&mut self, entry: &Entry) -> String {
        let json = serde_json::to_string(entry).expect("entries are plain data");
        let line = self.seal(&json);
        self.advance(&json);
        line
    }

    /// Reads the next line.
    ///
    /// # Errors
    /// If it is damaged or not the next one; then the chain is where it was.
    pub fn read(&mut self, line: &str) -> Result<Entry, LineError> {
        let (hash, json) = line.split_once(' ').ok_or(LineError::Chain)?;
        let mut next = *self;
        next.advance(json);
        if hash != &next.0.to_string()[..16] {
            return Err(LineError::Chain);
        }
        let entry = serde_json::from_str(json).map_err(|error| LineError::Entry(error.to_string()))?;
        *self = next;
        Ok(entry)
    }

    /// Reads the next line as it stands in a file, with its end. None if that is missing: a crash cut the line short,
    /// so nobody was told of it.
    ///
    /// # Errors
    /// If it is damaged or not the next one; then the chain is where it was.
    pub fn read_whole(&mut self, line: &[u8]) -> Result<Option<Entry>, LineError> {
        let Some((b'\n', line)) = line.split_last() else { return Ok(None) };
        let line = std::str::from_utf8(line).map_err(|_| LineError::Chain)?;
        self.read(line).map(Some)
    }

    /// Whether the last line so far is this one.
    pub fn ends_with(&self, line: &str) -> bool {
        line.split_once(' ').is_some_and(|(hash, _)| hash == &self.0.to_string()[..16])
    }

    /// The line that says `json` after all lines so far, entry or not.
    pub fn seal(mut self, json: &str) -> String {
        self.advance(json);
        format!("{} {json}", &self.0.to_string()[..16])
    }

    fn advance(&mut self, json: &str) {
        self.0 = Digest::of_all([&self.0, &Digest::of(json.as_bytes())]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn began() -> Entry {
        Entry::Began { run: "r".into(), seed: 1, context: 8, layout: Digest::of(b"l"), theta: vec![Digest::of(b"t")] }
    }

    #[test]
    fn lines_chain_and_any_change_breaks_them() {
        let mut writer = Chain::default();
        let lines = [writer.write(&began()), writer.write(&Entry::Finished)];
        let mut reader = Chain::default();
        assert_eq!(reader.read(&lines[0]), Ok(began()));
        assert_eq!(reader.read(&lines[1]), Ok(Entry::Finished));
        assert_eq!(Chain::default().read(&lines[1]), Err(LineError::Chain));
        assert_eq!(Chain::default().read(&lines[0].replace("\"r\"", "\"s\"")), Err(LineError::Chain));
        assert_eq!(Chain::default().read(&lines[0][..lines[0].len() - 1]), Err(LineError::Chain));
    }

    fn commit(version: u64, contributions: Vec<Accepted>) -> Entry {
        Entry::Committed(Commit {
            fragment: FragmentId(0),
            version,
            contributions,
            recipe: Recipe {
                merge: crate::outer::Averaging::Radial,
                rule: crate::outer::OuterRule::default(),
                codec: crate::codec::Codec::F32,
                share: 1.0,
                guard: crate::outer::Guard::default(),
            },
            delta: Digest::of(b"d"),
            bytes: 1,
            digest: Digest::of(b"n"),
            agreements: Vec::new(),
            seconds: 0.0,
        })
    }

    #[test]
    fn a_commit_must_be_the_next_version() {
        let mut book = Book::default();
        book.apply(&began()).unwrap();
        assert!(book.apply(&commit(2, Vec::new())).is_err());
        book.apply(&commit(1, Vec::new())).unwrap();
        assert!(book.apply(&commit(1, Vec::new())).is_err());
        assert_eq!(book.digest(), Digest::of_all([&Digest::of(b"n")]));
    }

    #[test]
    fn epochs_count_up() {
        let mut book = Book::default();
        let leads = |epoch| Entry::Leads { epoch, holder: Digest::of(b"a process") };
        book.apply(&began()).unwrap();
        assert!(book.apply(&leads(2)).is_err());
        book.apply(&leads(1)).unwrap();
        assert!(book.apply(&leads(1)).is_err());
        book.apply(&leads(2)).unwrap();
        assert_eq!(book.epoch, 2);
    }

    #[test]
    fn the_last_contribution_of_a_site_is_known_over_its_sessions() {
        let site: SiteId = "a".parse().unwrap();
        let joined = |session| Entry::Joined {
            site: site.clone(),
            session,
            dataset: DatasetId(Digest::of(b"data")),
            samples: 8,
        };
        let contribution = |number, payload: &[u8]| Accepted {
            site: site.clone(),
            number,
            payload: Digest::of(payload),
            base: 0,
            steps: 1,
            tokens: 8,
            weight: 1.0,
            norm: 1.0,
            trust: 0.0,
            quality: 0.0,
            ranges: Ranges::new(),
        };
        let refused = Entry::Refused {
            site: site.clone(),
            number: 2,
            fragment: FragmentId(0),
            ranges: Ranges::new(),
            why: "a reason".into(),
        };
        let (key, ticket) = (Digest::of(b"key"), Digest::of(b"ticket"));
        let mut book = Book::default();
        let mut last = |entry: Entry| {
            book.apply(&entry).unwrap();
            book.fragments[0].delivered.get(&site).copied()
        };
        last(began());
        last(Entry::Admitted { site: site.clone(), key, ticket, role: Role::Train });
        assert_eq!(last(joined(1)), None);
        assert_eq!(last(commit(1, vec![contribution(1, b"first")])), Some(Digest::of(b"first")));
        assert_eq!(last(refused), Some(Digest::of(b"first")));
        assert_eq!(last(commit(2, Vec::new())), Some(Digest::of(b"first")));
        assert_eq!(last(joined(2)), Some(Digest::of(b"first")));
        assert_eq!(last(commit(3, vec![contribution(1, b"second")])), Some(Digest::of(b"second")));
    }
}
