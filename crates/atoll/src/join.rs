//! `atoll join`: a site.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use atoll_core::engine::Engine;
use atoll_core::round::Stop;
use atoll_cpu::{CpuEngine, Options, Precision};
use atoll_node::identity::Ticket;
use atoll_node::site::{Parts, SiteOptions, join};

use crate::{precision, stop};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The ticket that `atoll ticket` printed, or a file that holds it.
    ticket: String,
    /// Text to train on: a file, a folder, or a folder made by `atoll ingest`; without it, the sources
    /// of the crates Atoll is built from.
    #[arg(long, value_name = "PATH")]
    data: Option<PathBuf>,
    /// What to train on: cpu.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// The site's own folder, for its key and its tokens; without it, `atoll-SITE`.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Threads of the CPU engine; 0 takes all cores.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    #[command(flatten)]
    precision: precision::Arguments,
    /// Samples per micro-batch, if not the run's.
    #[arg(long)]
    rows: Option<usize>,
    /// Share of the threads' time that training may take, for machines that have other work to do.
    #[arg(long, default_value_t = 1.0)]
    share: f64,
    /// Data connections to the coordinator.
    #[arg(long, default_value_t = 4)]
    streams: usize,
    /// Stop when standard input ends.
    #[arg(long, hide = true)]
    supervised: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    if arguments.device != "cpu" {
        bail!("there is no device '{}' here\nhint: this build knows: cpu", arguments.device);
    }
    if !(arguments.share > 0.0 && arguments.share <= 1.0) {
        bail!("--share {} must be above 0 and at most 1", arguments.share);
    }
    if arguments.rows == Some(0) {
        bail!("--rows must be at least 1");
    }
    let ticket = ticket(&arguments.ticket)?;
    let dir = arguments.dir.clone().unwrap_or_else(|| PathBuf::from(format!("atoll-{}", ticket.site)));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = if arguments.threads == 0 { cores } else { arguments.threads };
    let precision = arguments.precision.resolve();
    let options = SiteOptions {
        dir,
        ticket,
        data: arguments.data.clone(),
        rows: arguments.rows,
        threads,
        share: arguments.share,
        streams: arguments.streams,
        engine: "cpu".to_string(),
        device: device_name(threads, precision, arguments.share),
    };
    tracing::info!("{} trains on {}", options.ticket.site, options.device);
    let flag = stop::flag(arguments.supervised)?;
    let make = |parts| make_engine(parts, threads, precision);
    let ending = join(&options, make, &flag, &mut |line| tracing::info!("{line}"))?;
    match ending {
        Stop::Finished => println!("the run is finished"),
        _ => println!("{} left the run; the same command comes back to it", options.ticket.site),
    }
    Ok(())
}

fn ticket(text: &str) -> Result<Ticket> {
    let path = PathBuf::from(text);
    let is_file = text.len() < 4096 && path.is_file();
    let text = if is_file {
        fs::read_to_string(&path).with_context(|| format!("{} cannot be read", path.display()))?
    } else {
        text.to_string()
    };
    Ticket::from_text(&text)
}

fn device_name(threads: usize, precision: Precision, share: f64) -> String {
    let (plural, precision) = (if threads == 1 { "" } else { "s" }, precision::name(precision));
    let device = format!("cpu, {precision}, {threads} thread{plural}");
    if share < 1.0 { format!("{device} at {:.0} %", share * 100.0) } else { device }
}

fn make_engine(parts: Parts, threads: usize, precision: Precision) -> Result<Box<dyn Engine>> {
    let training = &parts.terms.config.training;
    let options = Options {
        model: parts.terms.model.clone(),
        optimizer: training.optimizer.clone(),
        muon: training.muon.clone(),
        precision,
        rows: parts.rows,
        accumulate: training.accumulate,
        threads,
    };
    let zeros = |fragment| vec![0.0; parts.manifest.fragment_len(fragment).unwrap_or(0)];
    let weights = parts.manifest.fragments().map(zeros).collect();
    let engine = CpuEngine::new(options, parts.manifest, weights, parts.feed)?;
    Ok(Box::new(engine))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_told_in_a_few_words() {
        assert_eq!(device_name(1, Precision::F32, 1.0), "cpu, f32, 1 thread");
        assert_eq!(device_name(8, Precision::Bf16, 0.25), "cpu, bf16, 8 threads at 25 %");
    }
}
