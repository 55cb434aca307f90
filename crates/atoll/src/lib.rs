//! `atoll`: trains one language model across several data centers, and serves it from them.
//!
//! Each subcommand is a module; they call `atoll-node` for files, sockets and rounds and `atoll-cpu`
//! for the engine. `demo` calls the other subcommands as processes and nothing else, but for its links.
//!
//! The command is a library so that it can be built with more [`Devices`] than the CPU, as `gpu/command` does.

mod align;
mod check;
mod coordinate;
mod cpu;
mod demo;
mod devices;
mod ingest;
mod join;
mod links;
mod measure;
mod model;
mod new;
mod precision;
mod rekey;
mod remote;
mod replay;
mod revoke;
mod rollback;
mod speak;
mod status;
mod stop;
mod ticket;
mod view;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

pub use devices::{Device, Devices, Listing, Offer, OnlyCpu};
pub use precision::Wish;

/// Trains one language model across several data centers, and serves it from them.
///
/// Try `atoll demo`. By hand: `atoll new` and `atoll coordinate` on one machine, `atoll ticket` for each
/// site, `atoll join` at each site, then `atoll generate`.
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
    /// Say more; twice for everything.
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    verbose: u8,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Train a model with a coordinator and several sites on this machine, live.
    Demo(demo::Arguments),
    /// Make a run folder: a commented run.toml, a tokenizer, the coordinator's key.
    New(new::Arguments),
    /// Show the resolved configuration of a run folder, or everything that is wrong with it.
    Check(check::Arguments),
    /// Prove that a model in PyTorch computes what the native engine does, or find the first layer that differs.
    Align(align::Arguments),
    /// Coordinate a run: merge what the sites contribute and commit it.
    Coordinate(coordinate::Arguments),
    /// Print a ticket: what one site needs to join.
    Ticket(ticket::Arguments),
    /// Take a site's key off the list, at once and for good; its tickets too.
    Revoke(revoke::Arguments),
    /// Give the coordinators of a run another key, of which its sites are told before.
    Rekey(rekey::Arguments),
    /// Look at a run from afar, fetch its model, invite and revoke, replace a key: whatever one's ticket allows.
    Remote(remote::Arguments),
    /// Join a run as a site and train.
    Join(join::Arguments),
    /// List what this machine can train on, with memory and a measured rate of matrix products.
    Devices(devices::Arguments),
    /// Measure what this machine brings to a run: tokens per second of a model in training.
    Measure(measure::Arguments),
    /// Look at a run, living or finished.
    Status(status::Arguments),
    /// Continue a text with the model.
    Generate(speak::GenerateArguments),
    /// Measure the model on text: bits per byte, loss, perplexity.
    Eval(speak::EvalArguments),
    /// Write the model as a Hugging Face folder.
    Export(speak::ExportArguments),
    /// Turn text into token shards.
    Ingest(ingest::Arguments),
    /// Take a stopped run back to an earlier commit; what came later is set aside.
    Rollback(rollback::Arguments),
    /// Compute a run's commits again from its journal and compare.
    Replay(replay::Arguments),
}

/// Does what the command line says, on the CPU or on one of `devices`.
pub fn run(devices: &dyn Devices) -> ExitCode {
    let arguments = Arguments::parse();
    let level = match arguments.verbose {
        0 => tracing::Level::INFO,
        1 => tracing::Level::DEBUG,
        _ => tracing::Level::TRACE,
    };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_target(false)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .init();
    let result = match arguments.command {
        Command::Align(arguments) => return exit(align::run(&arguments)),
        Command::Demo(arguments) => demo::run(&arguments),
        Command::New(arguments) => new::run(&arguments),
        Command::Check(arguments) => check::run(&arguments),
        Command::Coordinate(arguments) => coordinate::run(&arguments),
        Command::Ticket(arguments) => ticket::run(&arguments),
        Command::Revoke(arguments) => revoke::run(&arguments),
        Command::Rekey(arguments) => rekey::run(&arguments),
        Command::Remote(arguments) => remote::run(&arguments),
        Command::Join(arguments) => join::run(&arguments, devices),
        Command::Devices(arguments) => devices::run(&arguments, devices),
        Command::Measure(arguments) => measure::run(&arguments, devices),
        Command::Status(arguments) => status::run(&arguments),
        Command::Generate(arguments) => speak::generate(&arguments),
        Command::Eval(arguments) => speak::eval(&arguments),
        Command::Export(arguments) => speak::export(&arguments),
        Command::Ingest(arguments) => ingest::run(&arguments),
        Command::Rollback(arguments) => rollback::run(&arguments),
        Command::Replay(arguments) => replay::run(&arguments),
    };
    exit(result.map(|()| ExitCode::SUCCESS))
}

fn exit(result: anyhow::Result<ExitCode>) -> ExitCode {
    result.unwrap_or_else(|error| {
        complain(&error);
        ExitCode::FAILURE
    })
}

/// The sentences first, outermost to innermost, then the hint of the innermost that has one.
fn complain(error: &anyhow::Error) {
    let parts: Vec<String> = error.chain().map(ToString::to_string).collect();
    let (mut sentences, mut hint): (Vec<&str>, Option<&str>) = (Vec::new(), None);
    for part in &parts {
        match part.split_once("\nhint: ") {
            Some((sentence, rest)) => {
                sentences.push(sentence);
                hint = Some(rest);
            }
            None => sentences.push(part),
        }
    }
    sentences.dedup();
    eprintln!("error: {}", sentences.join(": "));
    if let Some(hint) = hint {
        eprintln!("hint: {hint}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Arguments::command().debug_assert();
    }
}
