//! How fast weights become bytes and back, and contributions one outer step, beside what the memory allows.
//!
//! ```text
//! GB/s      4 bytes × weights that are worked on / seconds / 10⁹; a merge of 8 works on 8 × weights
//! triad     a ← b + s·c over vectors that fit no cache: 3 × 4 bytes × weights / seconds (STREAM's way of counting)
//! share     bytes that must be moved at least / triad / seconds
//!
//! what must be moved, in bytes per weight:     read                                        written
//!   encode   residual += reference − θ         12                                          4 + payload
//!   decode   check, then Θ += payload          4 + payload                                 4
//!   look     is it sound, how long is it       payload                                     0
//!   merge    of 8 contributions                8 × payload                                 4
//!   step     b ← μ·b + Δ, encode, apply        16 (Δ, b, residual, Θ)                      12 + payload
//! ```
//!
//! A merge in which each contribution's length counts must know it before it can add: a coordinator looks at each when it
//! comes, which the row `look` is. Memory that the work itself asks for is fresh, as in the product, and
//! the system's price for it is in the seconds; the row `fresh memory` is that price alone: a vector allocated and
//! filled. Everything is done in turns, a round of all after the other, and each figure is the median of the rounds.
//! One core: the main thread alone, in processor seconds, so that others on the machine stretch them little. All cores:
//! the [`Crew`] on which a coordinator merges, in seconds of the clock. Rows that end in `few` are of weights of which an eighth
//! move, row by row of 128, as those of an embedding do: trellis-coded quantization speaks of few of them then.

mod material;

use anyhow::Result;
use atoll_core::codec::Codec;
use atoll_core::team::Alone;
use atoll_node::crew::Crew;

use crate::{Figures, median};
use material::{Material, Moved, SITES, Work};

/// Share of the memory's bandwidth that a merge of 8 shall reach.
const MERGE_SHARE: f64 = 0.5;
/// GB/s at which one core shall encode what goes up over a thin link.
const ENCODE: f64 = 1.0;

pub(crate) fn run(quick: bool) -> Result<Figures> {
    let (preset, fragments, rounds) = if quick { ("mini", 1, 5) } else { ("small", 4, 15) };
    let mut material = Material::new(preset, fragments, &Codec::ALL, Moved::All)?;
    let mut few_rows = Material::new(preset, fragments, &[material::UP, material::DOWN], Moved::FewRows)?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    println!("a fragment of {} weights, {SITES} contributions; medians of {rounds} rounds\n", material.weights());
    let mut lines = Line::all();
    for _ in 0..rounds {
        for line in &mut lines {
            let material = if line.moved == Moved::All { &mut material } else { &mut few_rows };
            line.alone.push(material.time(line.work, &Alone)?.busy);
            line.crew.push(Crew.run(|| material.time(line.work, &Crew))?.passed);
        }
    }
    let measured: Vec<Measured> = lines.iter().map(|line| line.measured(&material)).collect();
    print(&measured, cores);
    Ok(figures(&measured))
}

/// A work with the seconds that each round took.
struct Line {
    work: Work,
    moved: Moved,
    alone: Vec<f64>,
    crew: Vec<f64>,
}

impl Line {
    fn all() -> Vec<Self> {
        let codecs = |work: fn(Codec) -> Work| Codec::ALL.into_iter().map(work);
        let works = [Work::Triad, Work::Fresh].into_iter();
        let works = works
            .chain(codecs(Work::Encode))
            .chain(codecs(Work::Decode))
            .chain(codecs(Work::Look))
            .chain(codecs(Work::Merge));
        let all = works.chain([Work::Step]).map(|work| (work, Moved::All));
        let few = [Work::Encode(material::UP), Work::Decode(material::DOWN), Work::Merge(material::UP), Work::Step];
        let all = all.chain(few.map(|work| (work, Moved::FewRows)));
        all.map(|(work, moved)| Self { work, moved, alone: Vec::new(), crew: Vec::new() }).collect()
    }

    fn measured(&self, material: &Material) -> Measured {
        let weights = material.weights() as f64;
        let (name, payload) = match self.work {
            Work::Triad => ("triad".to_string(), 0.0),
            Work::Fresh => ("fresh memory".to_string(), 0.0),
            Work::Step => (format!("step {}", material::DOWN), material.payload_bytes(material::DOWN)),
            Work::Encode(codec) => (format!("encode {codec}"), material.payload_bytes(codec)),
            Work::Decode(codec) => (format!("decode {codec}"), material.payload_bytes(codec)),
            Work::Look(codec) => (format!("look {codec}"), material.payload_bytes(codec)),
            Work::Merge(codec) => (format!("merge{SITES} {codec}"), material.payload_bytes(codec)),
        };
        let name = if self.moved == Moved::All { name } else { format!("{name} few") };
        let gigabytes = worked_on(self.work) * weights / 1e9;
        let bytes = must_move(self.work, payload);
        let moved = bytes * weights / 1e9;
        let rates = |seconds: &[f64]| {
            let seconds = median(seconds.to_vec());
            (gigabytes / seconds, moved / seconds)
        };
        Measured { work: self.work, moved: self.moved, name, bytes, alone: rates(&self.alone), crew: rates(&self.crew) }
    }
}

/// Bytes of `f32` per weight that a work is about.
fn worked_on(work: Work) -> f64 {
    match work {
        Work::Triad => 12.0,
        Work::Merge(_) => 4.0 * SITES as f64,
        Work::Fresh | Work::Encode(_) | Work::Decode(_) | Work::Look(_) | Work::Step => 4.0,
    }
}

/// Bytes per weight that a work cannot do without; see the table above.
fn must_move(work: Work, payload: f64) -> f64 {
    match work {
        Work::Triad => 12.0,
        Work::Fresh => 4.0,
        Work::Encode(_) => 12.0 + 4.0 + payload,
        Work::Decode(_) => 4.0 + payload + 4.0,
        Work::Look(_) => payload,
        Work::Merge(_) => SITES as f64 * payload + 4.0,
        Work::Step => 16.0 + 12.0 + payload,
    }
}

/// What was measured of a work: GB/s of `f32`, and GB/s of what must be moved.
struct Measured {
    work: Work,
    moved: Moved,
    name: String,
    /// Bytes per weight that must be moved.
    bytes: f64,
    alone: (f64, f64),
    crew: (f64, f64),
}

impl Measured {
    /// Shares of what the memory allows: of one core, of all.
    fn shares(&self, triad: &Self) -> (f64, f64) {
        (self.alone.1 / triad.alone.1, self.crew.1 / triad.crew.1)
    }
}

fn print(measured: &[Measured], cores: usize) {
    let Some(triad) = measured.first() else { return };
    println!("                   bytes moved          GB/s of f32       share of the triad's");
    println!("                    per weight   one core   {cores:2} cores      one core   {cores:2} cores");
    for line in measured {
        let (alone, crew) = line.shares(triad);
        println!(
            "{:18} {:11.3} {:10.2} {:10.2} {:13.2} {:10.2}",
            line.name, line.bytes, line.alone.0, line.crew.0, alone, crew
        );
    }
    println!();
    for line in measured.iter().filter(|line| line.moved == Moved::All) {
        let (alone, crew) = line.shares(triad);
        match line.work {
            Work::Merge(codec) if codec == material::UP => println!(
                "a merge of {SITES} {codec} adds {:.2} GB/s of f32, {:.0} % of what a core's triad moves; what it must move \
                 itself it moves at {:.0} % of that ({:.0} % on all cores; wanted: {:.0} %)",
                line.alone.0,
                100.0 * line.alone.0 / triad.alone.0,
                100.0 * alone,
                100.0 * crew,
                100.0 * MERGE_SHARE
            ),
            Work::Encode(codec) if codec == material::UP => {
                println!("a core encodes {:.2} GB/s of {codec} (wanted: {ENCODE:.0})", line.alone.0);
            }
            _ => {}
        }
    }
}

fn figures(measured: &[Measured]) -> Figures {
    let mut figures = Figures::new();
    let Some(triad) = measured.first() else { return figures };
    for line in measured {
        let name = line.name.replace([' ', ':'], "_");
        figures.insert(format!("{name}_gb_per_second"), line.alone.0);
        figures.insert(format!("{name}_all_cores_gb_per_second"), line.crew.0);
        let (alone, crew) = line.shares(triad);
        figures.insert(format!("{name}_bandwidth_share"), alone);
        figures.insert(format!("{name}_all_cores_bandwidth_share"), crew);
    }
    figures
}
