//! What is compared.

use atoll_core::codec::Codec;
use atoll_core::delta::{Feedback, Follow};
use atoll_core::outer::{Averaging, OuterRule};
use atoll_core::round::{Absent, Setting, Sync};
use atoll_core::training::{AdamW, Muon, Training};

/// Sites of every row.
pub(super) const SITES: usize = 4;
/// The row with all of Atoll's defaults.
pub(super) const DEFAULT: &str = "default";

/// A way to train.
#[derive(Debug, Clone)]
pub(super) struct Row {
    pub(super) name: &'static str,
    /// The row that it is compared with.
    pub(super) against: &'static str,
    pub(super) way: Way,
    pub(super) sync: Sync,
    pub(super) training: Training,
    /// Inner steps that each site takes while the slowest takes one.
    pub(super) speeds: [f64; SITES],
    pub(super) share: Share,
}

/// Who trains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// One engine with the rows of so many sites in each step.
    Parallel(usize),
    /// Sites and a coordinator.
    Sites,
}

/// Which part of the text a site has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Share {
    /// All bring the same text and share its samples.
    Same,
    /// Each has a quarter of its own, in the text's order.
    Own,
}

/// What a row is unless it says otherwise.
fn usual() -> Row {
    Row {
        name: "",
        against: "parallel",
        way: Way::Sites,
        sync: Sync { evaluate_seconds: 1e6, ..Sync::default() },
        training: Training {
            // Short, so that short runs have many steps; 1,024 tokens a step, so that they are not all noise.
            context: 128,
            rows: 8,
            // As `atoll new --preset nano` has it, but for a warm-up that fits runs of some hundred steps.
            optimizer: AdamW { learning_rate: 3e-3, warmup_steps: 20, ..AdamW::default() },
            ..Training::default()
        },
        speeds: [1.0, 1.0, 2.0, 4.0],
        share: Share::Same,
    }
}

fn row(name: &'static str, change: impl FnOnce(&mut Row)) -> Row {
    let mut row = Row { name, ..usual() };
    change(&mut row);
    row
}

/// All rows: the baselines, then the rest as it matters.
pub(super) fn rows() -> Vec<Row> {
    let nesterov = OuterRule::Nesterov { learning_rate: 0.7, momentum: 0.9 };
    let muon = || Some(Muon { learning_rate: 3e-3, ..Muon::default() });
    let even = [1.0; SITES];
    const ALL: Way = Way::Parallel(SITES);
    vec![
        row("parallel", |r| r.way = ALL),
        row("parallel-muon", |r| (r.way, r.training.muon, r.against) = (ALL, muon(), "parallel-muon")),
        row(DEFAULT, |_| {}),
        // One knob of the defaults at a time: does it pay?
        row("memoryless", |r| r.sync.outer = OuterRule::Memoryless { learning_rate: 1.0 }),
        row("momentum-0.6", |r| r.sync.outer = OuterRule::Auto { momentum: 0.6 }),
        row("nesterov", |r| r.sync.outer = nesterov),
        row("buffer", |r| r.sync.feedback = Feedback::Buffer),
        row("plain", |r| r.sync.merge = Averaging::Plain),
        row("carry", |r| r.sync.follow = Follow::Carry),
        row("overwrite", |r| r.sync.follow = Follow::Overwrite),
        row("h4", |r| r.sync.steps = Setting::Is(4)),
        row("h8", |r| r.sync.steps = Setting::Is(8)),
        row("h16", |r| r.sync.steps = Setting::Is(16)),
        row("h64", |r| r.sync.steps = Setting::Is(64)),
        row("f32", |r| (r.sync.up, r.sync.down) = (Codec::F32, Codec::F32)),
        row("bf16", |r| (r.sync.up, r.sync.down) = (Codec::Bf16, Codec::Bf16)),
        row("e3m0", |r| (r.sync.up, r.sync.down) = (Codec::E3m0, Codec::E3m0)),
        row("up-f32", |r| r.sync.up = Codec::F32),
        row("down-f32", |r| r.sync.down = Codec::F32),
        row("even", |r| r.speeds = even),
        row("even-h4", |r| (r.speeds, r.sync.steps) = (even, Setting::Is(4))),
        row("even-h8", |r| (r.speeds, r.sync.steps) = (even, Setting::Is(8))),
        row("even-plain", |r| (r.speeds, r.sync.merge) = (even, Averaging::Plain)),
        row("even-nesterov", |r| (r.speeds, r.sync.outer) = (even, nesterov)),
        row("muon", |r| (r.training.muon, r.against) = (muon(), "parallel-muon")),
        row("own-text", |r| r.share = Share::Own),
        row("own-text-ignore", |r| (r.share, r.sync.absent) = (Share::Own, Absent::Ignore)),
        row("nesterov-h64", |r| (r.sync.outer, r.sync.steps) = (nesterov, Setting::Is(64))),
        row("one-alone", |r| r.way = Way::Parallel(1)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_can_train_and_find_their_baselines() {
        let rows = rows();
        for row in &rows {
            assert_eq!((row.sync.problems(), row.training.problems()), (vec![], vec![]), "{}", row.name);
            assert_eq!(rows.iter().filter(|other| other.name == row.name).count(), 1, "{}", row.name);
            assert!(
                rows.iter().any(|base| base.name == row.against && base.way == Way::Parallel(SITES)),
                "{}",
                row.name
            );
        }
    }
}
