//! What is compared: a row is the defaults with some knobs turned.

use anyhow::{Context, Result};
use atoll_core::codec::Codec;
use atoll_core::delta::{Feedback, Follow};
use atoll_core::outer::{Averaging, OuterRule};
use atoll_core::plan;
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
    /// What every site's link carries, up and down.
    pub(super) megabits: f64,
    pub(super) share: Share,
}

/// Who trains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// One engine with the rows of so many sites in each step.
    Parallel(usize),
    /// Engines that synchronize all fragments after every so many steps: local steps without a network.
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
        megabits: 50.0,
        share: Share::Same,
    }
}

/// What the baselines are called; with knobs that change the training, such a baseline has them too.
const PARALLEL: &str = "parallel";
/// A departure from the defaults.
type Knob = (&'static str, fn(&mut Row));
/// A departure by a number, written `knob=0.7`.
type Dial = (&'static str, fn(&mut Row, f32));

/// Who trains.
const WAYS: &[Knob] =
    &[(DEFAULT, |_| {}), (PARALLEL, |r| r.way = Way::Parallel(SITES)), ("one-alone", |r| r.way = Way::Parallel(1))];
/// Sites side by side that average every so many steps, plainly and in f32 unless knobs behind it say otherwise.
const LOCKSTEP: &str = "lockstep";

/// How everybody trains, baseline and sites, or with [`INNER`] before it the sites alone.
const TRAINING: &[Dial] = &[
    ("rate", |r, by| scale_rates(&mut r.training, by)),
    ("embedding", |r, rate| r.training.optimizer.embedding_rate = rate),
    ("floor", |r, share| r.training.optimizer.embedding_floor = share),
    ("beta1", |r, beta| r.training.optimizer.beta1 = beta),
    ("clip", |r, norm| r.training.optimizer.clip_norm = norm),
    ("final", |r, share| r.training.optimizer.final_share = share),
    ("beta2", |r, beta| r.training.optimizer.beta2 = beta),
    ("rows", |r, rows| r.training.rows = rows as usize),
    ("muon", |r, rate| r.training.muon = Some(Muon { learning_rate: rate, ..Muon::default() })),
];
const INNER: &str = "inner-";
/// How sites synchronize.
const SYNC: &[Dial] = &[
    ("h", |r, steps| r.sync.steps = Setting::Is(steps as u32)),
    ("mbit", |r, megabits| r.megabits = f64::from(megabits)),
    ("step", |r, rate| r.sync.outer = OuterRule::Nesterov { learning_rate: rate, momentum: momentum(r) }),
    ("momentum", |r, mu| r.sync.outer = OuterRule::Nesterov { learning_rate: step(r), momentum: mu }),
    ("auto-momentum", |r, momentum| r.sync.outer = OuterRule::Auto { momentum }),
];
/// What else is Atoll's own.
const OURS: &[Knob] = &[
    ("memoryless", |r| r.sync.outer = OuterRule::Memoryless { learning_rate: 1.0 }),
    ("nesterov", |r| r.sync.outer = OuterRule::Nesterov { learning_rate: 0.7, momentum: 0.9 }),
    ("buffer", |r| r.sync.feedback = Feedback::Buffer),
    ("plain", |r| r.sync.merge = Averaging::Plain),
    ("radial", |r| r.sync.merge = Averaging::Radial),
    ("carry", |r| r.sync.follow = Follow::Carry),
    ("overwrite", |r| r.sync.follow = Follow::Overwrite),
    ("f32", |r| (r.sync.up, r.sync.down) = (Setting::Is(Codec::F32), Setting::Is(Codec::F32))),
    ("bf16", |r| (r.sync.up, r.sync.down) = (Setting::Is(Codec::Bf16), Setting::Is(Codec::Bf16))),
    ("e3m0", |r| (r.sync.up, r.sync.down) = (Setting::Is(Codec::E3m0), Setting::Is(Codec::E3m0))),
    ("sparse", |r| (r.sync.up, r.sync.down) = (Setting::Is(Codec::Sparse(96)), Setting::Is(Codec::Sparse(224)))),
    ("thin", |r| (r.sync.up, r.sync.down) = thin()),
    ("up-thin", |r| r.sync.up = thin().0),
    ("down-thin", |r| r.sync.down = thin().1),
    ("even", |r| r.speeds = [1.0; SITES]),
    ("own-text", |r| r.share = Share::Own),
    ("ignore", |r| r.sync.absent = Absent::Ignore),
    ("whole", |r| r.sync.fragments = 1),
];

/// The thinnest codecs.
fn thin() -> (Setting<Codec>, Setting<Codec>) {
    let (up, down) = plan::THINNEST;
    (Setting::Is(up), Setting::Is(down))
}

/// Multiplies the learning rates of both inner optimizers.
fn scale_rates(training: &mut Training, by: f32) {
    training.optimizer.learning_rate *= by;
    if let Some(muon) = &mut training.muon {
        muon.learning_rate *= by;
    }
}

/// η of a row whose outer rule says one.
fn step(row: &Row) -> f32 {
    match row.sync.outer {
        OuterRule::Nesterov { learning_rate, .. } | OuterRule::Memoryless { learning_rate } => learning_rate,
        OuterRule::Auto { .. } => 1.0,
    }
}

/// μ of a row whose outer rule says one.
fn momentum(row: &Row) -> f32 {
    match row.sync.outer {
        OuterRule::Nesterov { momentum, .. } => momentum,
        OuterRule::Memoryless { .. } | OuterRule::Auto { .. } => 0.0,
    }
}

/// The rows of a whole table.
const TABLE: &[&str] = &[
    PARALLEL,
    "parallel+muon=0.003",
    DEFAULT,
    // One knob of the defaults at a time: does it pay?
    "memoryless",
    "auto-momentum=0.6",
    "nesterov",
    "buffer",
    "plain",
    "carry",
    "overwrite",
    "h=4",
    "h=8",
    "h=16",
    "h=64",
    "f32",
    "bf16",
    "e3m0",
    "sparse",
    "thin",
    "thin+h=1",
    "thin+h=32",
    "up-thin",
    "down-thin",
    "even",
    "even+plain",
    "even+nesterov",
    "nesterov+h=64",
    "muon=0.003",
    "own-text",
    "own-text+ignore",
    "one-alone",
];

/// The rows of these names, or of the whole table, with the baselines that they need, or with the row `against` in their place.
pub(super) fn rows(names: &[String], against: Option<&str>) -> Result<Vec<Row>> {
    let mut named: Vec<Row> = match names {
        [] => TABLE.iter().map(|name| row(name)).collect::<Result<_>>()?,
        names => names.iter().map(|name| row(name)).collect::<Result<_>>()?,
    };
    if let Some(against) = against {
        named.iter_mut().for_each(|row| row.against = against.to_string());
    }
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
        turn(&mut row, word).with_context(|| format!("the row '{name}'"))?;
        let dial = word.split('=').next().unwrap_or(word);
        if TRAINING.iter().any(|(knob, _)| *knob == dial) {
            row.against = format!("{}+{word}", row.against);
        }
    }
    Ok(row)
}

/// Turns the knob that `word` names, or the dial with its number.
fn turn(row: &mut Row, word: &str) -> Result<()> {
    let Some((dial, number)) = word.split_once('=') else {
        let knob = [WAYS, OURS].into_iter().flatten().find(|(knob, _)| *knob == word);
        let (_, turn) = knob.with_context(|| unknown(word))?;
        turn(row);
        return Ok(());
    };
    let number: f32 = number.parse().with_context(|| format!("'{number}' of {dial} is no number"))?;
    if dial == LOCKSTEP {
        row.way = Way::Lockstep((number as u64).max(1));
        row.sync.merge = Averaging::Plain;
        row.sync.outer = OuterRule::Memoryless { learning_rate: 1.0 };
        (row.sync.up, row.sync.down) = (Setting::Is(Codec::F32), Setting::Is(Codec::F32));
        return Ok(());
    }
    let found = match dial.strip_prefix(INNER) {
        Some(inner) => TRAINING.iter().find(|(knob, _)| *knob == inner),
        None => [TRAINING, SYNC].into_iter().flatten().find(|(knob, _)| *knob == dial),
    };
    let (_, turn) = found.with_context(|| unknown(word))?;
    turn(row, number);
    Ok(())
}

fn unknown(word: &str) -> String {
    let knobs: Vec<&str> = [WAYS, OURS].into_iter().flatten().map(|(knob, _)| *knob).collect();
    let inner = TRAINING.iter().map(|(dial, _)| format!("{INNER}{dial}"));
    let dials = [TRAINING, SYNC].into_iter().flatten().map(|(dial, _)| dial.to_string());
    let dials = [LOCKSTEP.to_string()].into_iter().chain(dials).chain(inner);
    let dials: Vec<String> = dials.map(|dial| format!("{dial}=N")).collect();
    format!("there is no knob '{word}'\nhint: join some of these by +: {} {}", knobs.join(" "), dials.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_can_train_and_find_their_baselines() {
        let rows = rows(&[], None).unwrap();
        assert_eq!(rows.len(), TABLE.len());
        for row in &rows {
            assert_eq!((row.sync.problems(), row.training.problems()), (vec![], vec![]), "{}", row.name);
            let base = rows.iter().find(|base| base.name == row.against).unwrap();
            assert_eq!((base.way, &base.training), (Way::Parallel(SITES), &row.training), "{}", row.name);
        }
    }

    #[test]
    fn any_row_may_be_what_the_others_are_compared_with() {
        let rows = rows(&["thin".to_string(), "thin+h=8".to_string()], Some("thin")).unwrap();
        let against: Vec<_> = rows.iter().map(|row| (row.name.as_str(), row.against.as_str())).collect();
        assert_eq!(against[1], ("thin+h=8", "thin"));
        assert_eq!((against.len(), against[0].0), (2, "thin"), "no data parallelism");
    }

    #[test]
    fn knobs_add_up() {
        let rows = rows(&["muon=0.003+even+h=4".to_string()], None).unwrap();
        assert_eq!(
            rows.iter().map(|row| row.name.as_str()).collect::<Vec<_>>(),
            ["parallel+muon=0.003", "muon=0.003+even+h=4"]
        );
        assert_eq!((rows[1].sync.steps, rows[1].speeds), (Setting::Is(4), [1.0; SITES]));
        assert_eq!(row("lockstep=8+thin").unwrap().sync.up, thin().0);
        let (sites_alone, everybody) = (row("inner-beta2=0.99").unwrap(), row("beta2=0.99").unwrap());
        assert_eq!(sites_alone.training, everybody.training);
        assert_eq!((sites_alone.against.as_str(), everybody.against.as_str()), (PARALLEL, "parallel+beta2=0.99"));
        for wrong in ["even+odd", "h", "h=few", "even=1"] {
            assert!(format!("{:#}", row(wrong).unwrap_err()).contains(wrong), "{wrong}");
        }
    }
}
