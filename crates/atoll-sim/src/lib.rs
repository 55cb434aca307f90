//! The whole of Atoll in one thread and from one seed: the coordinator's and the sites' machines as
//! they run in production, and a network that loses, doubles, delays and reorders; processes crash and
//! come back. The same [`Description`] gives the same world to the last bit.
//!
//! ```text
//! Description   sites, links, hardships, Sync, goal ─┐
//! Habitat       manifest, first weights, engines ────┴──▶ run ──▶ Outcome
//! ```
//!
//! [`run`] lives one world to its end and checks every invariant of ARCHITECTURE.md on the way, with
//! any engine. [`simulate`] fills a world with [`toy`] engines and the hardships of a seed;
//! [`absences`] asks what many worlds make of sites that come and go.

mod absent;
mod description;
mod habitat;
mod hostile;
pub mod toy;
mod world;

pub use absent::{Absences, Attendance, absences};
pub use description::{Description, Hardships, Link, Residence};
pub use habitat::{Habitat, Inhabitant, Leases};
pub use hostile::{simulate, simulate_thin};
pub use world::{DiskFailures, Outcome, Presence, run};
