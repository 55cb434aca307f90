//! Something that will happen.

use std::fmt;
use std::rc::Rc;

use atoll_core::delta::Change;
use atoll_core::hash::Digest;
use atoll_core::manifest::FragmentId;
use atoll_core::round::{Merged, SiteEvent, Standing, Status, Tried};

#[derive(Debug, Clone)]
pub(super) enum Happening {
    /// To the coordinator, over connection number `.1` of that site.
    Status(usize, u64, Box<Status>),
    Payload(usize, u64, Digest, Bytes),
    Request(usize, u64, Digest),
    /// A merge is done at post number `.0` in its life number `.1`; with it come the bytes to broadcast.
    Merged(usize, u64, Merged, Bytes),
    Tried(usize, u64, Tried),
    CoordinatorTick(usize, u64),
    /// It asked to be woken between two ticks.
    CoordinatorWakes(usize, u64),
    CoordinatorStarts(usize),
    /// A standby says that it leads, behind so many entries.
    Claim(usize, u64, usize),
    /// Site number `.0` has heard nothing for long over connection number `.1`.
    Doubt(usize, u64),
    /// To site number `.0`, over connection number `.1`.
    Standing(usize, u64, Box<Standing>),
    Acknowledged(usize, u64, Digest, bool),
    Delivered(usize, u64, Digest, Option<Bytes>),
    /// Sent without having been asked for.
    Pushed(usize, u64, Digest, Bytes),
    /// What the life of a site had its weights worked on beside the training is done.
    Worked(usize, u64, Work),
    /// To the life of site number `.0` in its life number `.1`.
    StepDone(usize, u64),
    SiteTick(usize, u64),
    SiteStarts(usize),
    Reconnect(usize, u64),
    Fault,
    DiskFault,
}

/// A change of an engine's weights, if there is one, and what is then to be said.
#[derive(Clone)]
pub(super) struct Work {
    pub(super) fragment: FragmentId,
    pub(super) change: Option<Change>,
    /// The bytes of a contribution.
    pub(super) payload: Option<Bytes>,
    pub(super) event: SiteEvent,
}

impl fmt::Debug for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.event)
    }
}

/// Bytes on their way. A trace tells how many; which, their address says.
#[derive(Clone)]
pub(super) struct Bytes(pub(super) Rc<Vec<u8>>);

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}
