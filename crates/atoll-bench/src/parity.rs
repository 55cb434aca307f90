//! What Atoll's training costs in quality: real engines on real text inside the simulated world, against
//! synchronous data parallelism on as many tokens. Time is virtual and all chance comes from seeds, so a
//! busy machine changes nothing but the wait.
//!
//! ```text
//! row = (Sync, Training, sites' speeds, their text) ──run──▶ Θ ──▶ held-out loss ──▶ gap to its baseline
//! baseline = one engine, whose steps take the rows of all sites at once
//! ```
//!
//! [`rows`] lists what is compared; `--rows even+h=4` turns two knobs at once.

mod lockstep;
mod parallel;
mod rows;
mod sites;
mod text;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;

use anyhow::Result;
use atoll_core::engine::{NoFeed, evaluate_all};
use atoll_core::manifest::Manifest;
use atoll_core::training::Training;
use atoll_cpu::{CpuEngine, Options, Precision};

use crate::{Arguments, Figures};
use rows::{Row, Way, rows};
use text::Text;

/// What every row has in common.
struct Setting {
    text: Text,
    /// Tokens of a run.
    tokens: u64,
    /// Runs of a row.
    seeds: u64,
}

/// One finished run.
#[derive(Debug, Clone, Copy, Default)]
struct Run {
    /// Held-out nats per token.
    nats: f64,
    /// Tokens in the model.
    tokens: f64,
    /// Virtual seconds.
    seconds: f64,
    /// Percent of contributions that missed the round they were made for.
    late_percent: f64,
    /// Mean megabytes that a site sent.
    megabytes_up: f64,
    /// Mean megabytes that a site received.
    megabytes_down: f64,
}

pub(crate) fn run(arguments: &Arguments) -> Result<Figures> {
    let chosen = rows(&arguments.rows, arguments.against.as_deref())?;
    let (tokens, seeds) = if arguments.quick { (200_000, 1) } else { (2_000_000, 3) };
    let setting = Setting {
        text: Text::read(arguments.data.as_deref())?,
        tokens: arguments.tokens.unwrap_or(tokens),
        seeds: arguments.seeds.unwrap_or(seeds).max(1),
    };
    let text = &setting.text;
    println!("{}", text.what);
    println!(
        "{} parameters, {} tokens in each of {} runs a row, {} held-out windows of {} tokens\n",
        text.model.parameters(),
        setting.tokens,
        setting.seeds,
        text.held_out.batches.iter().map(|batch| batch.rows).sum::<usize>(),
        text.context
    );
    println!("                        nats/  bits/                                virtual   late   MB up  MB down");
    println!("row                     token  byte    gap %  ± of mean   tokens    seconds      %  a site   a site");
    let mut table =
        Table { rows: &chosen, runs: BTreeMap::new(), printed: vec![false; chosen.len()], setting: &setting };
    live(&chosen, &setting, &mut table)?;
    Ok(table.figures())
}

/// Does all runs, one world per core, and shows each to `table`.
fn live(rows: &[Row], setting: &Setting, table: &mut Table<'_>) -> Result<()> {
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    let jobs: Vec<(usize, u64)> = (0..rows.len()).flat_map(|row| (1..=setting.seeds).map(move |s| (row, s))).collect();
    let next = AtomicUsize::new(0);
    let (sender, results) = mpsc::channel();
    std::thread::scope(|scope| {
        for _ in 0..workers {
            let (sender, next, jobs) = (sender.clone(), &next, &jobs);
            scope.spawn(move || {
                while let Some(&(row, seed)) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if sender.send((row, seed, one(&rows[row], setting, seed))).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        results.into_iter().try_for_each(|(row, seed, run)| {
            table.take(row, seed, run.map_err(|error| error.context(format!("{}, seed {seed}", rows[row].name)))?);
            Ok(())
        })
    })
}

fn one(row: &Row, setting: &Setting, seed: u64) -> Result<Run> {
    match row.way {
        Way::Parallel(sites) => parallel::run(row, setting, seed, sites),
        Way::Lockstep(steps) => lockstep::run(row, setting, seed, steps),
        Way::Sites => sites::run(row, setting, seed),
    }
}

/// How engines of a run with this `training` are made; `rows` samples a step.
fn options(text: &Text, training: &Training, rows: usize, precision: Precision) -> Options {
    Options {
        model: text.model.clone(),
        optimizer: training.optimizer.clone(),
        muon: training.muon.clone(),
        precision,
        rows,
        accumulate: training.accumulate,
        threads: 1,
    }
}

/// Nats per held-out token of the model `theta`, in f32.
fn held_out_nats(text: &Text, training: &Training, manifest: &Manifest, theta: Vec<Vec<f32>>) -> Result<f64> {
    let options = options(text, training, training.rows, Precision::F32);
    let mut engine = CpuEngine::new(options, manifest.clone(), theta, Box::new(NoFeed))?;
    let all = evaluate_all(&mut engine, &text.held_out.batches)?;
    Ok(all.nats / all.tokens.max(1) as f64)
}

/// Results as they come.
struct Table<'a> {
    rows: &'a [Row],
    /// By row and seed.
    runs: BTreeMap<(usize, u64), Run>,
    printed: Vec<bool>,
    setting: &'a Setting,
}

impl Table<'_> {
    /// Notes a run and prints the rows that it completes.
    fn take(&mut self, row: usize, seed: u64, run: Run) {
        self.runs.insert((row, seed), run);
        for row in 0..self.rows.len() {
            if !self.printed[row] && self.is_complete(row) && self.is_complete(self.baseline(row)) {
                self.printed[row] = true;
                self.print(row);
            }
        }
    }

    fn runs(&self, row: usize) -> Vec<Run> {
        self.runs.range((row, 0)..(row + 1, 0)).map(|(_, run)| *run).collect()
    }

    fn is_complete(&self, row: usize) -> bool {
        self.runs(row).len() as u64 == self.setting.seeds
    }

    fn baseline(&self, row: usize) -> usize {
        self.rows.iter().position(|other| other.name == self.rows[row].against).unwrap_or(row)
    }

    /// Percent that each seed's loss is above its baseline's.
    fn gaps(&self, row: usize) -> Vec<f64> {
        let pairs = self.runs(row).into_iter().zip(self.runs(self.baseline(row)));
        pairs.map(|(run, base)| (run.nats / base.nats - 1.0) * 100.0).collect()
    }

    fn mean(&self, row: usize, value: impl Fn(&Run) -> f64) -> f64 {
        mean(&self.runs(row).iter().map(value).collect::<Vec<_>>())
    }

    fn bits_per_byte(&self, nats: f64) -> f64 {
        let held_out = &self.setting.text.held_out;
        let tokens: usize = held_out.batches.iter().map(|batch| batch.rows * batch.length).sum();
        nats * tokens as f64 / std::f64::consts::LN_2 / held_out.bytes.max(1) as f64
    }

    fn print(&self, row: usize) {
        let (nats, gaps) = (self.mean(row, |run| run.nats), self.gaps(row));
        println!(
            "{:22} {nats:6.4}  {:.4}  {:+6.2}     {:6.2}  {:8.0}   {:8.0}  {:5.1}  {:6.1}   {:6.1}",
            self.rows[row].name,
            self.bits_per_byte(nats),
            mean(&gaps),
            standard_error(&gaps),
            self.mean(row, |run| run.tokens),
            self.mean(row, |run| run.seconds),
            self.mean(row, |run| run.late_percent),
            self.mean(row, |run| run.megabytes_up),
            self.mean(row, |run| run.megabytes_down),
        );
    }

    fn figures(&self) -> Figures {
        let mut figures = Figures::new();
        for (index, row) in self.rows.iter().enumerate() {
            let nats = self.mean(index, |run| run.nats);
            let gaps = self.gaps(index);
            let gap = mean(&gaps);
            let values = [
                ("nats_per_token", nats),
                ("bits_per_byte", self.bits_per_byte(nats)),
                ("loss_gap_percent", gap),
                ("loss_gap_percent_standard_error", standard_error(&gaps)),
                ("runs", gaps.len() as f64),
                ("tokens", self.mean(index, |run| run.tokens)),
                ("seconds", self.mean(index, |run| run.seconds)),
                ("late_percent", self.mean(index, |run| run.late_percent)),
                ("megabytes_up", self.mean(index, |run| run.megabytes_up)),
                ("megabytes_down", self.mean(index, |run| run.megabytes_down)),
            ];
            figures
                .extend(values.map(|(what, value)| (format!("{}_{what}", row.name.replace(['-', '+'], "_")), value)));
            if row.name == rows::DEFAULT {
                figures.insert("loss_gap_percent".to_string(), gap);
            }
        }
        figures
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// How uncertain the mean of `values` is; NaN for one value.
fn standard_error(values: &[f64]) -> f64 {
    let mean = mean(values);
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (squares / (values.len() as f64 - 1.0) / values.len() as f64).sqrt()
}
