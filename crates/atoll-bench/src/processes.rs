//! Benchmarks that train for real, with the `atoll` command and its processes.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::{Arguments, Figures, median};

/// Three sites for some minutes, then one alone on as many tokens.
pub(crate) fn joint(arguments: &Arguments) -> Result<Figures> {
    let bench = Bench::new(arguments)?;
    let minutes = arguments.minutes.unwrap_or(if arguments.quick { 0.5 } else { 10.0 });
    let three = bench.demo("three", &["--sites", "3", "--minutes", &minutes.to_string()])?;
    let tokens = three["tokens"].as_u64().context("a report has tokens")?.to_string();
    let alone = bench.demo("alone", &["--sites", "1", "--tokens", &tokens])?;
    println!("{}\n", bench.what);
    println!("                tokens   bits per byte   commits   seconds");
    let row = |name: &str, report: &Value| {
        let bits = report["bits_per_byte"]["last"].as_f64().unwrap_or(f64::NAN);
        println!(
            "{name:12} {:>9}   {bits:13.4}   {:>7}   {:7.0}",
            report["tokens"],
            report["commits"],
            report["seconds"].as_f64().unwrap_or(f64::NAN)
        );
        bits
    };
    let (three, alone) = (row("three sites", &three), row("one alone", &alone));
    let gap = (three / alone - 1.0) * 100.0;
    println!("\nthree sites against one alone: {gap:+.2} %");
    Ok(Figures::from([
        ("bits_per_byte_three".to_string(), three),
        ("bits_per_byte_alone".to_string(), alone),
        ("gap_percent".to_string(), gap),
    ]))
}

/// Two sites with and without a third that is slowed to a quarter, each on a share of the cores of its own.
pub(crate) fn slow(arguments: &Arguments) -> Result<Figures> {
    let bench = Bench::new(arguments)?;
    let minutes = arguments.minutes.unwrap_or(if arguments.quick { 0.2 } else { 1.0 }).to_string();
    let rounds = if arguments.quick { 1 } else { 3 };
    let cores = std::thread::available_parallelism().map_or(1, usize::from) as f64;
    // Less than half of the machine in all: what is measured is the protocol, not the fight of three
    // processes for two cores.
    let share = (0.45 * cores / 2.25).min(1.0).to_string();
    let mut ratios = Vec::new();
    println!("{}\nshare of a core per site: {share}\n", bench.what);
    println!("run   tokens/s of two sites   beside a slow third   ratio");
    for round in 1..=rounds {
        let common = ["--minutes", &minutes, "--share", &share];
        let two = bench.demo(&format!("two-{round}"), &[&common[..], &["--sites", "2", "--even"]].concat())?;
        let three = bench.demo(&format!("three-{round}"), &[&common[..], &["--sites", "3"]].concat())?;
        let speed = |report: &Value| -> f64 {
            (0..2).filter_map(|site| report["sites"][site]["tokens_per_second"].as_f64()).sum()
        };
        let (without, with) = (speed(&two), speed(&three));
        println!("{round:3}   {without:21.0}   {with:19.0}   {:.4}", with / without);
        ratios.push(with / without);
    }
    let ratio = median(ratios);
    println!("\nmedian ratio: {ratio:.4}");
    Ok(Figures::from([("others_speed_beside_slow_site".to_string(), ratio)]))
}

struct Bench {
    program: PathBuf,
    folder: tempfile::TempDir,
    data: Option<PathBuf>,
    what: String,
}

impl Bench {
    fn new(arguments: &Arguments) -> Result<Self> {
        let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_string());
        let built = Command::new(cargo).args(["build", "--release", "--package", "atoll"]).status()?;
        if !built.success() {
            bail!("the atoll command cannot be built");
        }
        let program = std::env::current_exe()?.with_file_name("atoll");
        let (data, what) = data(arguments.data.as_deref());
        Ok(Self { program, folder: tempfile::tempdir()?, data, what })
    }

    /// The report of a demo with these arguments.
    fn demo(&self, name: &str, arguments: &[&str]) -> Result<Value> {
        eprintln!("demo {}", arguments.join(" "));
        let mut command = Command::new(&self.program);
        command.args(["demo", "--json", "--out"]).arg(self.folder.path().join(name)).args(arguments);
        if let Some(data) = &self.data {
            command.arg("--data").arg(data);
        }
        let output = command.stderr(Stdio::inherit()).output()?;
        if !output.status.success() {
            bail!("the demo failed");
        }
        Ok(serde_json::from_slice(&output.stdout)?)
    }
}

/// The text to train on and what to call it.
pub(crate) fn data(wish: Option<&Path>) -> (Option<PathBuf>, String) {
    let sotu = Path::new("../shared/data/sotu.jsonl.zst");
    match wish {
        Some(path) => (Some(path.to_path_buf()), format!("text: {}", path.display())),
        None if sotu.exists() => (Some(sotu.to_path_buf()), "text: State of the Union addresses".to_string()),
        None => {
            eprintln!("NOTE: {} is absent; training on the default corpus, figures are not comparable", sotu.display());
            (None, "text: the default corpus".to_string())
        }
    }
}
