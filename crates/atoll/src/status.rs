//! `atoll status`: one look at a run, living or finished.

use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Result;
use atoll_node::report::Report;
use atoll_node::run::RunDir;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The run folder.
    dir: PathBuf,
    /// Also tell how synchronization does: per site what it costs, what was expected, and why; per fragment its round.
    #[arg(long)]
    rounds: bool,
    /// Print the whole report as JSON.
    #[arg(long)]
    json: bool,
}

/// A status older than this was not written by a living coordinator.
const SECONDS_FRESH: f64 = 10.0;

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let dir = RunDir(arguments.dir.clone());
    let mut report = Report::load(&dir.status())?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    if report.listen.is_some() && now - report.at > SECONDS_FRESH {
        report.state = "dead".to_string();
        report.sites.iter_mut().for_each(|site| site.state = "unknown".to_string());
    }
    show(&report, arguments.rounds, arguments.json)?;
    if report.state == "dead" && !arguments.json {
        println!(
            "the coordinator was last seen {:.0} s ago; `atoll coordinate {}` goes on",
            now - report.at,
            dir.0.display()
        );
    }
    Ok(())
}

/// Prints a report: how synchronization does with `rounds`, all of it as JSON with `json`.
pub(crate) fn show(report: &Report, rounds: bool, json: bool) -> Result<()> {
    if json {
        println!("{}", serde_json::to_string_pretty(report)?);
        return Ok(());
    }
    println!("{}", crate::view::line(report));
    for site in &report.sites {
        println!(
            "  {:16} {:8} {:22} {:>9.0} tok/s  {:>8} steps  {:>10} tokens in the model",
            site.name, site.state, site.device, site.tokens_per_second, site.steps, site.tokens
        );
        if site.refused > 0 {
            println!("  {:16} {} contributions refused, the latest: {}", "", site.refused, site.refusal);
        }
        if site.guarded > 0 {
            println!(
                "  {:16} {} of {} contributions guarded, the latest because it was {}; trust {:+.2}, quality {:+.2}",
                "", site.guarded, site.contributions, site.guarded_for, site.trust, site.quality
            );
        }
    }
    if rounds {
        print_rounds(report);
    }
    Ok(())
}

/// How synchronization does.
fn print_rounds(report: &Report) {
    println!("synchronization, by site");
    for site in &report.sites {
        println!("  {:16} {}", site.name, crate::view::synchronization(site));
        if !site.pace.is_empty() {
            println!("  {:16} H = {}: {}", "", site.steps_per_round, site.pace);
        }
    }
    println!("latest round, by fragment");
    for ((index, fragment), waits) in (0..).zip(&report.fragments).zip(&report.rounds) {
        println!("  fragment {index:<7} {}", crate::view::round(fragment));
        println!("  {:16} version {} {waits}", "", fragment.version + 1);
    }
}
