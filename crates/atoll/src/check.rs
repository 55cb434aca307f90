//! `atoll check`: what a run folder resolves to, or everything that is wrong with it.

use std::path::PathBuf;

use anyhow::Result;
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
        println!(
            "# {fragment}   {len} weights, {} bytes up and {} bytes down per round",
            sync.up.payload_len(len),
            sync.down.payload_len(len)
        );
    }
    println!("{} has no problems.", dir.0.display());
    Ok(())
}
