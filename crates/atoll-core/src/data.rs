//! Which sample is trained where. A dataset is `samples` windows of tokens; training visits them in
//! the order of a keyed [`Permutation`] that any site can compute, epoch after epoch, so a **position**
//! `p` (a `u64` that only grows) names epoch `p / samples` and one sample in it. Positions are leased
//! to sites as [`Ranges`] and counted in the [`Ledger`], which knows of every position ever leased
//! whether it is held, back in the pool, or consumed by a commit: exactly one of the three.

mod ledger;
mod permutation;
mod ranges;

pub use ledger::{DatasetId, Ledger, LedgerError, Pool};
pub use permutation::Permutation;
pub use ranges::Ranges;
