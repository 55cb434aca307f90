//! `atoll join`: a site.

use std::path::PathBuf;

use anyhow::{Result, bail};
use atoll_core::round::Stop;
use atoll_node::site::{SiteOptions, join};

use crate::cpu::Cpu;
use crate::devices::{Device, Devices};
use crate::{precision, stop, ticket};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The ticket that `atoll ticket` printed, or a file that holds it.
    ticket: String,
    /// Text to train on: a file, a folder, or a folder made by `atoll ingest`; without it, the sources
    /// of the crates Atoll is built from.
    #[arg(long, value_name = "PATH")]
    data: Option<PathBuf>,
    /// What to train on: cpu, or a name that `atoll devices` lists.
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
    /// Data connections to the coordinator; twice as many while the model is fetched.
    #[arg(long, default_value_t = 4)]
    streams: usize,
    /// Stop when standard input ends.
    #[arg(long, hide = true)]
    supervised: bool,
}

pub(crate) fn run(arguments: &Arguments, devices: &dyn Devices) -> Result<()> {
    if !(arguments.share > 0.0 && arguments.share <= 1.0) {
        bail!("--share {} must be above 0 and at most 1", arguments.share);
    }
    if arguments.rows == Some(0) {
        bail!("--rows must be at least 1");
    }
    let device = device(arguments, devices)?;
    let ticket = ticket::read(&arguments.ticket)?;
    let dir = arguments.dir.clone().unwrap_or_else(|| ticket::folder(&ticket));
    let options = SiteOptions {
        dir,
        ticket,
        data: arguments.data.clone(),
        rows: arguments.rows,
        threads: device.threads(),
        share: arguments.share,
        streams: arguments.streams,
        engine: device.engine_name().to_string(),
        device: device.describe(),
    };
    tracing::info!("{} trains on {}", options.ticket.site, options.device);
    let flag = stop::flag(arguments.supervised)?;
    let ending = join(&options, |parts| device.engine(parts), &flag, &mut |line| tracing::info!("{line}"))?;
    match ending {
        Stop::Finished => println!("the run is finished"),
        _ => println!("{} left the run; the same command comes back to it", options.ticket.site),
    }
    Ok(())
}

fn device(arguments: &Arguments, devices: &dyn Devices) -> Result<Box<dyn Device>> {
    if arguments.device == "cpu" {
        return Ok(Box::new(Cpu::new(arguments.threads, arguments.precision.resolve(), arguments.share)));
    }
    if arguments.share < 1.0 {
        bail!("--share is a share of CPU threads; {} has none\nhint: leave it out", arguments.device);
    }
    devices.open(&arguments.device, arguments.precision.wish())
}
