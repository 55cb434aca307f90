//! The house rules that a compiler does not check: floors, where `unsafe` may be, page lengths.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

/// Atoll's crates and their dependencies, tests' aside. Those for GPUs are a workspace of their own.
fn dependencies() -> BTreeMap<String, Vec<String>> {
    [root(), root().join("gpu")].iter().flat_map(|workspace| dependencies_in(workspace)).collect()
}

fn dependencies_in(workspace: &Path) -> BTreeMap<String, Vec<String>> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--offline", "--format-version", "1"])
        .current_dir(workspace)
        .output()
        .unwrap();
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let text = |value: &serde_json::Value| value.as_str().unwrap().to_string();
    let normal = |package: &serde_json::Value| {
        let all = package["dependencies"].as_array().unwrap().iter();
        all.filter(|dependency| dependency["kind"].is_null()).map(|dependency| text(&dependency["name"])).collect()
    };
    let packages = metadata["packages"].as_array().unwrap();
    packages.iter().map(|package| (text(&package["name"]), normal(package))).collect()
}

#[test]
fn floors_hold() {
    let floors: [(&str, &[&str]); 9] = [
        ("atoll-core", &[]),
        ("atoll-node", &["atoll-core"]),
        ("atoll-cpu", &["atoll-core"]),
        ("atoll-burn", &["atoll-core"]),
        ("atoll-sim", &["atoll-core"]),
        ("atoll", &["atoll-core", "atoll-node", "atoll-cpu"]),
        ("atoll-python", &["atoll-core", "atoll-node", "atoll-cpu"]),
        ("atoll-gpu", &["atoll-core", "atoll-node", "atoll-burn", "atoll"]),
        ("atoll-bench", &["atoll-core", "atoll-node", "atoll-cpu", "atoll-sim"]),
    ];
    let found = dependencies();
    assert_eq!(found.len(), floors.len(), "a new crate needs a floor: {:?}", found.keys());
    for (name, allowed) in floors {
        for dependency in found[name].iter().filter(|dependency| dependency.starts_with("atoll")) {
            assert!(allowed.contains(&dependency.as_str()), "{name} must not know {dependency}");
        }
    }
}

#[test]
fn the_core_is_pure() {
    // bytemuck: weights as bytes, to be hashed in place. pulp: loops for the processor at hand.
    let allowed = ["blake3", "bytemuck", "half", "postcard", "pulp", "serde", "serde_json", "thiserror"];
    for dependency in &dependencies()["atoll-core"] {
        assert!(allowed.contains(&dependency.as_str()), "atoll-core must stay pure; {dependency} needs a reason here");
    }
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn unsafe_stays_where_it_is_explained() {
    let allowed =
        ["crates/atoll-cpu/src/gemm/avx512.rs", "crates/atoll-cpu/src/pool.rs", "crates/atoll-node/src/data/map.rs"];
    let mut files = Vec::new();
    sources(&root().join("crates"), &mut files);
    sources(&root().join("gpu/engine"), &mut files);
    sources(&root().join("gpu/command"), &mut files);
    assert!(files.len() > 30, "the sources were not found");
    for file in files {
        let name = file.strip_prefix(root()).unwrap().to_string_lossy().into_owned();
        let text = fs::read_to_string(&file).unwrap();
        let opened = text.contains(concat!("allow(", "unsafe_code"));
        assert!(!opened || allowed.contains(&name.as_str()), "{name} allows unsafe code");
        let lines = text.lines().count();
        assert!(lines <= 900, "{name} has {lines} lines; what are its two ideas?");
    }
}

#[test]
fn every_decoder_is_fuzzed() {
    let targets = atoll_core::fuzz::TARGETS.into_iter().chain(atoll_node::fuzz::TARGETS);
    let names: BTreeSet<String> = targets.map(|target| target.name.to_string()).collect();
    let mut files = Vec::new();
    sources(&root().join("fuzz/fuzz_targets"), &mut files);
    let files = files.iter().map(|file| file.file_stem().unwrap().to_string_lossy().into_owned());
    assert_eq!(files.collect::<BTreeSet<String>>(), names);
    let manifest = fs::read_to_string(root().join("fuzz/Cargo.toml")).unwrap();
    for name in names {
        let law = fs::read_to_string(root().join(format!("fuzz/fuzz_targets/{name}.rs"))).unwrap();
        assert!(law.contains(&format!("law(\"{name}\")")), "{name}.rs tries another law");
        assert!(manifest.contains(&format!("name = \"{name}\"")), "fuzz/Cargo.toml does not name {name}");
    }
}

#[test]
fn pages_stay_readable() {
    for (page, most) in [("ARCHITECTURE.md", 250), ("README.md", 250), ("STYLE.md", 60)] {
        let lines = fs::read_to_string(root().join(page)).unwrap().lines().count();
        assert!(lines <= most, "{page} has {lines} lines, {most} are enough");
    }
}

/// Burn's hundreds of crates stay out of what everybody builds, and out of the lock file that the default corpus reads.
#[test]
fn burn_is_only_in_the_workspace_for_gpus() {
    let holds_burn = |lock: &str| fs::read_to_string(root().join(lock)).unwrap().contains("name = \"burn-core\"");
    assert!(!holds_burn("Cargo.lock"));
    assert!(holds_burn("gpu/Cargo.lock"));
}
