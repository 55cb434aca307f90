//! `atoll check`: what a run folder resolves to, or everything that is wrong with it.

use std::path::PathBuf;

use anyhow::Result;
use atoll_core::codec::Codec;
use atoll_core::plan::{Codecs, LADDER};
use atoll_core::round::Setting;
use atoll_node::coordinator::Prepared;
use atoll_node::identity::Identity;
use atoll_node::run::RunDir;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The run folder.
    dir: PathBuf,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let dir = RunDir(arguments.dir.clone());
    let prepared = Prepared::read(&dir)?;
    prepared.config.trial_text(&dir)?;
    let key = Identity::load(&dir.key())?;
    println!("{}", toml::to_string_pretty(&prepared.config)?);
    let manifest = &prepared.manifest;
    println!("# key          {}", key.fingerprint);
    println!("# tokenizer    {} ({} tokens)", prepared.tokenizer.hash(), prepared.tokenizer.vocab_size());
    println!("# layout       {}", manifest.fingerprint());
    println!("# parameters   {}", manifest.parameters());
    let sync = &prepared.config.sync;
    for fragment in manifest.fragments() {
        let len = manifest.fragment_len(fragment).unwrap_or(0);
        let (up, down) = (bytes(sync.up, |rung| rung.0, len), bytes(sync.down, |rung| rung.1, len));
        println!("# {fragment}   {len} weights, {up} bytes up and {down} bytes down per round");
    }
    println!("{} has no problems.", dir.0.display());
    Ok(())
}

/// Bytes of a payload of `len` weights, or from where to where they go if the codec is chosen as the run goes on.
fn bytes(codec: Setting<Codec>, of: fn(&Codecs) -> Codec, len: usize) -> String {
    match codec {
        Setting::Is(codec) => codec.payload_len(len).to_string(),
        Setting::Auto => {
            let ladder = LADDER.iter().map(|rung| of(rung).payload_len(len));
            let (most, least) = (ladder.clone().max().unwrap_or(0), ladder.min().unwrap_or(0));
            format!("{least} to {most}")
        }
    }
}
