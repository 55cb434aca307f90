//! The processes of the network benchmarks: this program again, as the coordinator or as a site. Both run
//! what `atoll coordinate` and `atoll join` run; only the engine is an [`Emulated`] one.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::{Context, Result};
use atoll_core::engine::Engine;
use atoll_node::coordinator::{Options, coordinate, runtime};
use atoll_node::identity::Ticket;
use atoll_node::run::RunDir;
use atoll_node::site::{Parts, SiteOptions, join, told};
use serde::{Deserialize, Serialize};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

use crate::emulated::{Diary, Emulated};
use crate::meter;

/// What a process is.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Role {
    Coordinator {
        /// The run folder.
        dir: PathBuf,
        /// Where to listen.
        listen: String,
        /// Where to note what it uses.
        meter: PathBuf,
        /// A file that the benchmark holds locked as long as it lives.
        alive: PathBuf,
        /// Whether it waits behind whoever leads.
        standby: Standby,
    },
    Site(SiteRole),
}

/// When a coordinator starts as a standby.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Standby {
    Never,
    /// Once the run has begun in its folder.
    Later,
    Always,
}

/// What a site needs to know.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct SiteRole {
    /// The site's own folder.
    pub(crate) dir: PathBuf,
    pub(crate) ticket: String,
    /// A dataset that is ready.
    pub(crate) data: PathBuf,
    /// Where to note what the engine does.
    pub(crate) diary: PathBuf,
    /// Where to note what it uses.
    pub(crate) meter: PathBuf,
    /// Milliseconds of an inner step.
    pub(crate) step_ms: u64,
    /// Tells this site's noise from the others'.
    pub(crate) seed: u64,
}

/// As many as `atoll join` makes.
const STREAMS: usize = 4;

/// Plays that role, until it is killed.
pub(crate) fn play(spec: &str) -> Result<()> {
    log();
    match serde_json::from_str(spec).context("--worker wants a role in JSON")? {
        Role::Coordinator { dir, listen, meter, alive, standby } => {
            meter::start(&meter)?;
            end_with(File::open(alive)?);
            lead(&RunDir(dir), listen, standby)
        }
        Role::Site(role) => follow(role),
    }
}

/// Logs what an operator sees, and what a site is told by coordinators: see [`told`](atoll_node::site::told).
fn log() {
    let targets = Targets::new().with_default(tracing::Level::INFO).with_target(told::TARGET, tracing::Level::TRACE);
    let lines = tracing_subscriber::fmt::layer().with_target(false).with_ansi(false).with_writer(std::io::stderr);
    tracing_subscriber::registry().with(lines.with_filter(targets)).init();
}

/// Ends this process, and with it the lab, when the benchmark is gone, however it went.
fn end_with(alive: File) {
    std::thread::spawn(move || {
        if alive.lock().is_ok() {
            std::process::exit(1);
        }
    });
}

fn lead(dir: &RunDir, listen: String, standby: Standby) -> Result<()> {
    let (_never, stop) = tokio::sync::watch::channel(false);
    let standby = match standby {
        Standby::Never => false,
        Standby::Later => dir.journal().exists(),
        Standby::Always => true,
    };
    runtime()?.block_on(coordinate(dir, &Options { listen, standby, ..Options::default() }, None, stop))?;
    Ok(())
}

fn follow(role: SiteRole) -> Result<()> {
    meter::start(&role.meter)?;
    let options = SiteOptions {
        dir: role.dir,
        ticket: Ticket::from_text(&role.ticket)?,
        data: Some(role.data),
        rows: None,
        threads: 1,
        share: 1.0,
        streams: STREAMS,
        engine: "emulated".to_string(),
        device: format!("steps of {} ms", role.step_ms),
    };
    let make = |parts: Parts| -> Result<Box<dyn Engine>> {
        let (step, diary) = (Duration::from_millis(role.step_ms), Diary::new(&role.diary)?);
        Ok(Box::new(Emulated::new(parts.manifest, parts.feed, parts.rows, step, role.seed, diary)))
    };
    join(&options, make, &Arc::new(AtomicBool::new(false)), &mut |line| tracing::info!("{line}"))?;
    Ok(())
}
