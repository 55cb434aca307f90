//! How fast the CPU engine trains and generates, beside PyTorch and llama.cpp in the same minutes.
//!
//! Machines are shared and noisy, so what counts is a ratio between contenders that met the same noise.
//! Every contender is a process of its own, with its own peak memory; between its turns it waits on a pipe
//! and uses no processor. All contenders of one shape are started and warmed up, then they take turns:
//!
//! ```text
//! round 1:  peak   Atoll fp32   PyTorch eager fp32   PyTorch compiled fp32   Atoll bf16   …   one step each
//! round 2:  peak   …   PyTorch eager fp32   Atoll fp32                       the same, backwards
//! ```
//!
//! A ratio is the median of the rounds' ratios; a speed the median of the rounds' speeds. The processor's peak
//! is measured in every round too, and what others on the machine took meanwhile. What could not be measured is named loudly and has no figure.

mod generation;
mod gguf;
mod others;
mod report;
mod side;
mod spec;
mod torch;
mod worker;

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::{Arguments, Figures};
use others::{Look, Others};
use report::{Ceiling, Measured, Results};
use side::Side;
use spec::{Cell, Contender, Number};
use torch::Torch;

pub(crate) use others::everybody_seconds;
pub(crate) use worker::work;

/// Between two turns, until the threads of the one before sleep: OpenMP's may spin for 200 ms.
const PAUSE: Duration = Duration::from_millis(250);

/// One model and how long it is measured.
struct Shape {
    preset: &'static str,
    threads: &'static [usize],
    numbers: &'static [Number],
    /// Steps before the first round: PyTorch compiles, memory is touched for the first time.
    warm_up_steps: usize,
    rounds: usize,
    /// No further round begins after these seconds, counted from the start of the first process.
    seconds_max: u64,
    compiled: bool,
}

const BOTH: &[Number] = &[Number::Fp32, Number::Bf16];

/// `small` twice, because all of its processes at once would take some 20 GiB of memory.
const SHAPES: [Shape; 4] = [
    Shape { preset: "mini", threads: &[2, 1], numbers: BOTH, rounds: 21, seconds_max: 1200, ..LONG },
    Shape { preset: "micro", threads: &[2, 1], numbers: BOTH, rounds: 9, seconds_max: 400, ..LONG },
    Shape { preset: "small", threads: &[2], numbers: &[Number::Fp32], ..LONG },
    Shape { preset: "small", threads: &[2], numbers: &[Number::Bf16], ..LONG },
];

const LONG: Shape =
    Shape { preset: "", threads: &[], numbers: &[], warm_up_steps: 2, rounds: 7, seconds_max: 600, compiled: true };

const QUICK: [Shape; 1] = [Shape {
    preset: "mini",
    threads: &[2],
    numbers: BOTH,
    warm_up_steps: 1,
    rounds: 9,
    seconds_max: 45,
    compiled: false,
}];

/// What is not there to be measured, in sentences.
#[derive(Default)]
struct Missing(Vec<String>);

impl Missing {
    fn add(&mut self, what: String) {
        eprintln!("MISSING: {what}");
        self.0.push(what);
    }
}

pub(crate) fn run(arguments: &Arguments) -> Result<Figures> {
    let mut missing = Missing::default();
    let torch =
        Torch::find(arguments.python.as_deref()).map_err(|error| missing.add(format!("PyTorch. {error:#}"))).ok();
    report::introduce(torch.as_ref());
    let mut figures = Figures::new();
    for shape in if arguments.quick { &QUICK[..] } else { &SHAPES } {
        let results = train(shape, torch.as_ref(), &mut missing)?;
        results.print();
        figures.extend(results.figures());
    }
    figures.extend(generation::run(arguments, &mut missing)?);
    for what in &missing.0 {
        println!("\nMISSING: {what}");
    }
    Ok(figures)
}

/// Measures one shape: all its contenders, in turns.
fn train(shape: &Shape, torch: Option<&Torch>, missing: &mut Missing) -> Result<Results> {
    let began = Instant::now();
    let mut racers = start(shape, torch, missing)?;
    let (mut ceilings, mut others) = (ceilings(shape), Others::default());
    for round in 0..shape.rounds {
        if time_is_up(round, began, shape.seconds_max) {
            break;
        }
        sleep(PAUSE);
        ceilings.iter_mut().for_each(Ceiling::measure);
        take_turns(round, &mut racers, &mut others);
        drop_failed(&mut racers, missing)?;
    }
    let cells = racers.into_iter().map(|racer| racer.measured).collect();
    Results::new(shape.preset, cells, ceilings, others)
}

/// The first round happens even when time is up.
fn time_is_up(round: usize, began: Instant, seconds_max: u64) -> bool {
    round > 0 && began.elapsed().as_secs() >= seconds_max
}

/// A contender at work.
struct Racer {
    side: Side,
    measured: Measured,
    failed: Option<anyhow::Error>,
}

/// Starts and warms up every contender of a shape, one after the other.
fn start(shape: &Shape, torch: Option<&Torch>, missing: &mut Missing) -> Result<Vec<Racer>> {
    let mut racers = Vec::new();
    for cell in cells(shape, torch.is_some()) {
        eprintln!("starting {cell}");
        let side = match (cell.contender, torch) {
            (Contender::Atoll, _) => worker::start(&cell.spec()?),
            (_, Some(torch)) => torch.start(&cell.spec()?),
            (_, None) => continue,
        };
        let warm = side.and_then(|mut side| side.ask(shape.warm_up_steps).map(|_| side));
        match warm {
            Ok(side) => racers.push(Racer { side, measured: Measured::new(cell), failed: None }),
            Err(error) if cell.contender == Contender::Atoll => return Err(error.context(format!("{cell}"))),
            Err(error) => missing.add(format!("{cell}. {error:#}")),
        }
    }
    Ok(racers)
}

fn cells(shape: &Shape, torch: bool) -> Vec<Cell> {
    let eager = [Contender::Atoll, Contender::Eager, Contender::Compiled];
    let contenders = if !torch {
        &eager[..1]
    } else if shape.compiled {
        &eager[..]
    } else {
        &eager[..2]
    };
    let mut cells = Vec::new();
    for &threads in shape.threads {
        for &number in shape.numbers {
            cells.extend(contenders.iter().map(|&contender| Cell { preset: shape.preset, threads, number, contender }));
        }
    }
    cells
}

fn ceilings(shape: &Shape) -> Vec<Ceiling> {
    let of = |&threads| shape.numbers.iter().map(move |&number| Ceiling::new(number, threads));
    shape.threads.iter().flat_map(of).collect()
}

/// One step of each.
fn take_turns(round: usize, racers: &mut [Racer], others: &mut Others) {
    for index in turns(round, racers.len()) {
        let racer = &mut racers[index];
        sleep(PAUSE);
        let before = Look::at(racer.side.process());
        match racer.side.ask(1) {
            Ok(answer) => racer.measured.add(&answer),
            Err(error) => racer.failed = Some(error),
        }
        others.add(before.as_ref(), Look::at(racer.side.process()).as_ref());
    }
}

/// Who goes when: every second round backwards, so that a steady drift of the machine favours nobody.
fn turns(round: usize, count: usize) -> impl Iterator<Item = usize> {
    (0..count).map(move |turn| if round.is_multiple_of(2) { turn } else { count - 1 - turn })
}

/// Goes on without PyTorch processes that died; without Atoll there is nothing to measure.
fn drop_failed(racers: &mut Vec<Racer>, missing: &mut Missing) -> Result<()> {
    for racer in racers.extract_if(.., |racer| racer.failed.is_some()) {
        let (cell, error) = (racer.measured.cell, racer.failed.context("a failed racer has an error")?);
        if cell.contender == Contender::Atoll {
            return Err(error.context(format!("{cell}")));
        }
        missing.add(format!("{cell}. {error:#}"));
    }
    Ok(())
}
