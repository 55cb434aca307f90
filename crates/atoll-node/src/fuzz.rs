//! What must hold for any bytes that the node reads: see [`atoll_core::fuzz`].

mod laws;
mod recovery;

use atoll_core::fuzz::Target;

/// The decoders of this crate.
pub const TARGETS: [Target; 15] = [
    Target { name: "run_toml", law: laws::run_toml, seeds: laws::run_tomls },
    Target { name: "terms", law: laws::terms, seeds: laws::all_terms },
    Target { name: "ticket", law: laws::ticket, seeds: laws::tickets },
    Target { name: "key", law: laws::key, seeds: laws::keys },
    Target { name: "link", law: laws::link, seeds: laws::links },
    Target { name: "shard", law: laws::shard, seeds: laws::shards },
    Target { name: "dataset", law: laws::dataset, seeds: laws::datasets },
    Target { name: "text", law: laws::text, seeds: laws::texts },
    Target { name: "tokenizer", law: laws::tokenizer, seeds: laws::tokenizers },
    Target { name: "model_config", law: laws::model_config, seeds: laws::model_configs },
    Target { name: "weights", law: laws::weights, seeds: laws::all_weights },
    Target { name: "recovery", law: recovery::law, seeds: recovery::seeds },
    Target { name: "site_files", law: laws::site_files, seeds: laws::all_site_files },
    Target { name: "shared", law: laws::shared, seeds: laws::all_shared },
    Target { name: "wan", law: laws::wan, seeds: laws::wans },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_law_holds_for_any_bytes() {
        for target in TARGETS {
            target.hold(300).unwrap();
        }
    }
}
