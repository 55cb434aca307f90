//! Benchmarks. `cargo run --release -p atoll-bench -- NAME [--quick] [--json]` runs one, prints a table that
//! a reader understands and, with `--json`, as its last line one object with stable names. `--quick` ends
//! within minutes. Numbers here are measured, not asserted: machines differ and are shared.

mod absent;
mod bytes;
mod chaos;
mod codec;
mod efficiency;
mod emulated;
mod engine;
mod exchange;
mod lab;
mod meter;
mod parity;
mod processes;
mod roles;
mod scale;
mod scenario;
mod sim;
mod wan;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use anyhow::Result;
use clap::{Parser, ValueEnum};

/// Atoll's benchmarks.
#[derive(Debug, Parser)]
struct Arguments {
    /// Which one.
    name: Name,
    /// End within two minutes; `chaos`, within six.
    #[arg(long)]
    quick: bool,
    /// Print one JSON object as the last line.
    #[arg(long)]
    json: bool,
    /// Text for the benchmarks that train; without it, the State of the Union if it is at hand, else the
    /// default corpus.
    #[arg(long, value_name = "PATH")]
    data: Option<PathBuf>,
    /// The rows of `parity` to run, each some knobs joined by +, such as even+h=4, or of `exchange`, such as 100mbit or
    /// join; without it, the whole table.
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    rows: Vec<String>,
    /// The row that all rows of `parity` are compared with, instead of data parallelism with their own inner optimizer, which
    /// takes as long as they do.
    #[arg(long, value_name = "ROW")]
    against: Option<String>,
    /// Runs of each row of `parity`.
    #[arg(long)]
    seeds: Option<u64>,
    /// Tokens of each run of `parity`.
    #[arg(long)]
    tokens: Option<u64>,
    /// Minutes of training in `joint` and `slow`, of the storm in `chaos`.
    #[arg(long)]
    minutes: Option<f64>,
    /// The Python whose PyTorch `engine` compares with; without it $PYTHON, else python3.
    #[arg(long, value_name = "PATH")]
    python: Option<PathBuf>,
    /// The `llama-bench` of llama.cpp that `engine` compares with.
    #[arg(long, value_name = "PATH", default_value = "llama-bench")]
    llama_bench: PathBuf,
    /// Seed of the storm in `chaos`.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Folder for all that `chaos` leaves behind: logs, journals, the timeline.
    #[arg(long, value_name = "FOLDER", default_value = "target/chaos")]
    out: PathBuf,
    /// Look again at the storm that is in the folder of `chaos`, without a new one.
    #[arg(long)]
    again: bool,
    /// What `engine` asks of a process that it starts.
    #[arg(long, value_name = "JSON", hide = true)]
    worker: Option<String>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Name {
    /// Codecs: gigabytes of weights per second, bits per weight.
    Codec,
    /// What a round costs its coordinator: contributions, size of the model, idle sites.
    Scale,
    /// The CPU engine beside PyTorch and llama.cpp: tokens per second, memory, share of the processor's peak.
    Engine,
    /// Sites that come and go with data of their own: how far the model ends from the mean of their data.
    Absent,
    /// Simulated worlds: how many of many seeds hold every invariant.
    Sim,
    /// Sites in a simulated world against synchronous data parallelism on as many tokens: held-out loss.
    Parity,
    /// Three sites against one that trains alone on the same tokens: held-out bits per byte.
    Joint,
    /// Sites of speeds 1:2:4:8 in one run against the sum of what each does alone: tokens per second.
    Efficiency,
    /// What a slow site costs the others: their tokens per second with and without it.
    Slow,
    /// Four sites behind slow, long and lossy links: the share of time that they spend in inner steps.
    Wan,
    /// All bytes on the wire per inner step, against data parallelism in bf16.
    Bytes,
    /// One synchronization of two sites: seconds that it blocks, seconds until it is applied.
    Exchange,
    /// A run in a storm of killed, paused and cut off sites and coordinators: what it loses, how soon it goes on.
    Chaos,
}

/// Named results.
type Figures = BTreeMap<String, f64>;

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    if let Some(spec) = &arguments.worker {
        return match arguments.name {
            Name::Wan | Name::Bytes | Name::Exchange | Name::Efficiency | Name::Chaos => roles::play(spec),
            _ => engine::work(spec),
        };
    }
    let began = Instant::now();
    let mut figures = match arguments.name {
        Name::Codec => codec::run(arguments.quick)?,
        Name::Scale => scale::run(arguments.quick)?,
        Name::Engine => engine::run(&arguments)?,
        Name::Absent => absent::run(arguments.quick),
        Name::Parity => parity::run(&arguments)?,
        Name::Sim => sim::run(arguments.quick),
        Name::Joint => processes::joint(&arguments)?,
        Name::Slow => processes::slow(&arguments)?,
        Name::Wan => wan::run(&arguments)?,
        Name::Bytes => bytes::run(&arguments)?,
        Name::Exchange => exchange::run(&arguments)?,
        Name::Efficiency => efficiency::run(&arguments)?,
        Name::Chaos => chaos::run(&arguments)?,
    };
    println!("\nmachine: {}", machine());
    // What could not be measured has no figure.
    figures.retain(|_, value| value.is_finite());
    if arguments.json {
        let name = arguments.name.to_possible_value().map_or_else(String::new, |value| value.get_name().to_string());
        let seconds = began.elapsed().as_secs_f64();
        println!(
            "{}",
            serde_json::json!({
                "bench": name, "command": command(), "commit": commit(), "machine": machine(),
                "seconds": seconds, "figures": figures,
            })
        );
    }
    Ok(())
}

/// What was asked for, so that it can be asked for again.
fn command() -> String {
    std::iter::once("atoll-bench".to_string()).chain(std::env::args().skip(1)).collect::<Vec<_>>().join(" ")
}

fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find(|line| line.starts_with("model name")).and_then(|line| line.split(": ").nth(1));
    format!(
        "{} {}, {cores} cores, {}",
        std::env::consts::OS,
        std::env::consts::ARCH,
        model.unwrap_or("unknown processor")
    )
}

fn commit() -> String {
    let output = Command::new("git").args(["rev-parse", "--short", "HEAD"]).output();
    output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_string()).unwrap_or_default()
}

/// The middle value.
fn median(values: Vec<f64>) -> f64 {
    quantile(values, 0.5)
}

/// The value below which this share of the others lies; NaN for none.
fn quantile(mut values: Vec<f64>, share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get((values.len() as f64 * share) as usize).copied().unwrap_or(f64::NAN)
}
