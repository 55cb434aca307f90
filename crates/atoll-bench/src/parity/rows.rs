//! What is compared: a row is the defaults with some knobs turned.

use anyhow::{Result, bail};
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
    /// Its knobs, joined by `+`.
    pub(super) name: String,
    /// The row that it is compared with.
    pub(super) against: String,
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
    /// Engines that average all their weights after every so many steps: local steps without a network, in f32.
    Lockstep(u64),
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

/// How sites train unless a row says otherwise.
pub(super) fn training() -> Training {
    Training {
        // Short, so that short runs have many steps; 1,024 tokens a step, so that they are not all noise.
        context: 128,
        rows: 8,
        // As `atoll new --preset nano` has it, but for a warm-up that fits runs of some hundred steps.
        optimizer: AdamW {
            learning_rate: 1.5e-3,
            embedding_rate: 64.0,
            embedding_floor: 1.0,
            warmup_steps: 20,
            ..AdamW::default()
        },
        ..Training::default()
    }
}

/// What a row is unless it says otherwise.
fn usual() -> Row {
    Row {
        name: DEFAULT.to_string(),
        against: PARALLEL.to_string(),
        way: Way::Sites,
        sync: Sync { evaluate_seconds: 1e6, ..Sync::default() },
        training: training(),
        speeds: [1.0, 1.0, 2.0, 4.0],
        share: Share::Same,
    }
}

/// What the baselines are called; with knobs that change the training, such a baseline has them too.
const PARALLEL: &str = "parallel";
/// A departure from the defaults.
type Knob = (&'static str, fn(&mut Row));

const NESTEROV: OuterRule = OuterRule::Nesterov { learning_rate: 0.7, momentum: 0.9 };

/// All knobs: the ways, the training (which a baseline shares), and the rest, which is Atoll's own.
const WAYS: &[Knob] = &[
    (DEFAULT, |_| {}),
    (PARALLEL, |r| r.way = Way::Parallel(SITES)),
    ("one-alone", |r| r.way = Way::Parallel(1)),
    ("lockstep-1", |r| r.way = Way::Lockstep(1)),
    ("lockstep-2", |r| r.way = Way::Lockstep(2)),
    ("lockstep-4", |r| r.way = Way::Lockstep(4)),
    ("lockstep-8", |r| r.way = Way::Lockstep(8)),
    ("lockstep-32", |r| r.way = Way::Lockstep(32)),
];
const TRAINING: &[Knob] = &[
    ("muon", |r| r.training.muon = Some(Muon { learning_rate: 3e-3, ..Muon::default() })),
    ("lr-half", |r| r.training.optimizer.learning_rate *= 0.5),
    ("lr-double", |r| r.training.optimizer.learning_rate *= 2.0),
    ("embedding-8", |r| r.training.optimizer.embedding_rate = 8.0),
    ("embedding-128", |r| r.training.optimizer.embedding_rate = 128.0),
    ("floor-0", |r| r.training.optimizer.embedding_floor = 0.0),
    ("floor-0.1", |r| r.training.optimizer.embedding_floor = 0.1),
    ("beta2-99", |r| r.training.optimizer.beta2 = 0.99),
    ("beta2-999", |r| r.training.optimizer.beta2 = 0.999),
    ("rows-2", |r| r.training.rows = 2),
    ("rows-4", |r| r.training.rows = 4),
    ("rows-16", |r| r.training.rows = 16),
    ("rows-32", |r| r.training.rows = 32),
];
const OURS: &[Knob] = &[
    ("memoryless", |r| r.sync.outer = OuterRule::Memoryless { learning_rate: 1.0 }),
    ("momentum-0.6", |r| r.sync.outer = OuterRule::Auto { momentum: 0.6 }),
    ("nesterov", |r| r.sync.outer = NESTEROV),
    ("buffer", |r| r.sync.feedback = Feedback::Buffer),
    ("plain", |r| r.sync.merge = Averaging::Plain),
    ("carry", |r| r.sync.follow = Follow::Carry),
    ("overwrite", |r| r.sync.follow = Follow::Overwrite),
    ("h1", |r| r.sync.steps = Setting::Is(1)),
    ("h2", |r| r.sync.steps = Setting::Is(2)),
    ("h4", |r| r.sync.steps = Setting::Is(4)),
    ("h8", |r| r.sync.steps = Setting::Is(8)),
    ("h16", |r| r.sync.steps = Setting::Is(16)),
    ("h64", |r| r.sync.steps = Setting::Is(64)),
    ("f32", |r| (r.sync.up, r.sync.down) = (Setting::Is(Codec::F32), Setting::Is(Codec::F32))),
    ("bf16", |r| (r.sync.up, r.sync.down) = (Setting::Is(Codec::Bf16), Setting::Is(Codec::Bf16))),
    ("e3m0", |r| (r.sync.up, r.sync.down) = (Setting::Is(Codec::E3m0), Setting::Is(Codec::E3m0))),
    ("auto-codec", |r| (r.sync.up, r.sync.down) = (Setting::Auto, Setting::Auto)),
    ("up-f32", |r| r.sync.up = Setting::Is(Codec::F32)),
    ("down-f32", |r| r.sync.down = Setting::Is(Codec::F32)),
    ("even", |r| r.speeds = [1.0; SITES]),
    ("own-text", |r| r.share = Share::Own),
    ("ignore", |r| r.sync.absent = Absent::Ignore),
    ("whole", |r| r.sync.fragments = 1),
    ("inner-0.7", |r| r.training.optimizer.learning_rate *= 0.7),
    ("inner-half", |r| r.training.optimizer.learning_rate *= 0.5),
    ("inner-double", |r| r.training.optimizer.learning_rate *= 2.0),
    ("inner-1.4", |r| r.training.optimizer.learning_rate *= 1.4),
    ("inner-beta2-99", |r| r.training.optimizer.beta2 = 0.99),
    ("nesterov-0.5", |r| r.sync.outer = OuterRule::Nesterov { learning_rate: 0.7, momentum: 0.5 }),
    ("step-2", |r| r.sync.outer = OuterRule::Nesterov { learning_rate: 2.0, momentum: 0.0 }),
    ("step-1.5", |r| r.sync.outer = OuterRule::Nesterov { learning_rate: 1.5, momentum: 0.0 }),
];

/// The rows of a whole table.
const TABLE: &[&str] = &[
    PARALLEL,
    "parallel+muon",
    DEFAULT,
    // One knob of the defaults at a time: does it pay?
    "memoryless",
    "momentum-0.6",
    "nesterov",
    "buffer",
    "plain",
    "carry",
    "overwrite",
    "h4",
    "h8",
    "h16",
    "h64",
    "f32",
    "bf16",
    "e3m0",
    "up-f32",
    "down-f32",
    "even",
    "even+plain",
    "even+nesterov",
    "nesterov+h64",
    "muon",
    "own-text",
    "own-text+ignore",
    "one-alone",
];

/// The rows of these names, or of the whole table, with the baselines that they need.
pub(super) fn rows(names: &[String]) -> Result<Vec<Row>> {
    let named: Vec<Row> = match names {
        [] => TABLE.iter().map(|name| row(name)).collect::<Result<_>>()?,
        names => names.iter().map(|name| row(name)).collect::<Result<_>>()?,
    };
    let mut rows: Vec<Row> = Vec::new();
    let baselines = named.iter().map(|named| row(&named.against)).collect::<Result<Vec<Row>>>()?;
    for row in baselines.into_iter().chain(named) {
        if !rows.iter().any(|other| other.name == row.name) {
            rows.push(row);
        }
    }
    Ok(rows)
}

/// The row whose knobs these are, joined by `+`.
fn row(name: &str) -> Result<Row> {
    let mut row = Row { name: name.to_string(), ..usual() };
    for word in name.split('+') {
        let knobs = || [WAYS, TRAINING, OURS].into_iter().flatten();
        let Some((_, turn)) = knobs().find(|(knob, _)| *knob == word) else {
            let known: Vec<&str> = knobs().map(|(knob, _)| *knob).collect();
            bail!("there is no knob '{word}' for the row '{name}'\nhint: join some of these by +: {}", known.join(" "));
        };
        turn(&mut row);
        if TRAINING.iter().any(|(knob, _)| *knob == word) {
            row.against = format!("{}+{word}", row.against);
        }
    }
    Ok(row)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_can_train_and_find_their_baselines() {
        let rows = rows(&[]).unwrap();
        assert_eq!(rows.len(), TABLE.len());
        for row in &rows {
            assert_eq!((row.sync.problems(), row.training.problems()), (vec![], vec![]), "{}", row.name);
            let base = rows.iter().find(|base| base.name == row.against).unwrap();
            assert_eq!((base.way, &base.training), (Way::Parallel(SITES), &row.training), "{}", row.name);
        }
    }

    #[test]
    fn knobs_add_up() {
        let rows = rows(&["muon+even+h4".to_string()]).unwrap();
        assert_eq!(rows.iter().map(|row| row.name.as_str()).collect::<Vec<_>>(), ["parallel+muon", "muon+even+h4"]);
        assert_eq!((rows[1].sync.steps, rows[1].speeds), (Setting::Is(4), [1.0; SITES]));
        assert!(row("even+odd").unwrap_err().to_string().contains("'odd'"));
    }
}
