//! What a world is like, before anything happens in it.

use atoll_core::data::DatasetId;
use atoll_core::plan;
use atoll_core::rng::Rng;
use atoll_core::round::{Goal, Sync};
use atoll_core::site::SiteId;

/// One world: who lives where, how they synchronize, what happens to them and until when.
#[derive(Debug, Clone)]
pub struct Description {
    /// All chance in this world comes from here.
    pub chance: Rng,
    /// How the run synchronizes.
    pub sync: Sync,
    /// When it is done.
    pub goal: Goal,
    /// Tokens per sample.
    pub context: u64,
    /// The sites, in the order in which a [`Habitat`](crate::Habitat) counts them.
    pub sites: Vec<Residence>,
    /// What the world does to them.
    pub hardships: Hardships,
    /// Simulated seconds after which a run that is not finished counts as broken.
    pub seconds_max: f64,
    /// Keep all payloads, so that the coordinator may crash and the end is checked against a replay of
    /// the journal. Without it memory stays small, and nothing may crash the coordinator.
    pub keeps_payloads: bool,
}

/// One site.
#[derive(Debug, Clone, PartialEq)]
pub struct Residence {
    /// Its name.
    pub name: SiteId,
    /// The dataset it brings.
    pub dataset: DatasetId,
    /// Samples in one epoch of it.
    pub samples: u64,
    /// Samples that one inner step uses.
    pub samples_per_step: u64,
    /// Simulated seconds that one inner step takes.
    pub step_seconds: f64,
    /// Its way to the coordinator.
    pub link: Link,
}

/// A site's way to the coordinator and back. Payloads travel one after the other; messages are small
/// and only delayed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Link {
    /// Bytes per second towards the coordinator.
    pub up: f64,
    /// Bytes per second from the coordinator.
    pub down: f64,
    /// Seconds one way, on top of what [`Hardships::delay`] adds.
    pub delay: f64,
}

impl Link {
    /// A link whose only delays are the world's hardships.
    pub const INFINITE: Link = Link { up: f64::INFINITY, down: f64::INFINITY, delay: 0.0 };

    /// A symmetric link of so many megabits per second and that round trip.
    pub fn of(megabits: f64, round_trip_seconds: f64) -> Self {
        let rate = megabits * 1e6 / 8.0;
        Self { up: rate, down: rate, delay: round_trip_seconds / 2.0 }
    }

    /// What a site would find out about it; no measurement says "infinite".
    pub fn as_measured(&self) -> plan::Link {
        const GREATEST: f64 = 1e12;
        plan::Link { up: self.up.min(GREATEST), down: self.down.min(GREATEST), rtt: 2.0 * self.delay }
    }
}

/// What a world does to its inhabitants.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Hardships {
    /// Probability that a message is lost.
    pub loss: f64,
    /// Probability that a message comes twice.
    pub doubling: f64,
    /// Longest delay of a message in seconds; each takes its own, so they overtake one another.
    pub delay: f64,
    /// Crashes of processes, chosen at random among sites and coordinator.
    pub crashes: u32,
    /// Seconds without connection, chosen at random among sites.
    pub cuts: u32,
    /// Longest time without connection in seconds; a crash may last a little longer.
    pub away: f64,
    /// Crashes and cuts end after this many seconds, so that every world can show that it recovers.
    pub seconds: f64,
    /// Failures of disks, chosen at random among those of sites and coordinator: full for a while, torn writes, bits that
    /// flip in what is stored.
    pub disk_faults: u32,
    /// A second coordinator stands by, the run lies in an object store, and either may be paused as well as killed.
    pub standby: bool,
}

impl Hardships {
    const AWAY: f64 = 4.0;
    const SECONDS: f64 = 40.0;

    /// A network as one would wish it.
    pub const NONE: Hardships = Hardships {
        loss: 0.0,
        doubling: 0.0,
        delay: 0.02,
        crashes: 0,
        cuts: 0,
        away: Self::AWAY,
        seconds: Self::SECONDS,
        disk_faults: 0,
        standby: false,
    };

    /// The hostile network that belongs to `seed`: up to 20 % loss, 10 % doubling, 0.4 s of delay, five
    /// crashes, five cuts and five failures of disks; half of the worlds have a standby.
    pub fn of(seed: u64) -> Self {
        let mut rng = Rng::new(seed ^ 0xA70);
        Self {
            loss: rng.unit() * 0.2,
            doubling: rng.unit() * 0.1,
            delay: 0.01 + rng.unit() * 0.4,
            crashes: rng.below(6) as u32,
            cuts: rng.below(6) as u32,
            away: Self::AWAY,
            seconds: Self::SECONDS,
            standby: rng.chance(0.5),
            disk_faults: rng.below(6) as u32,
        }
    }
}
