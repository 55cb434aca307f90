//! A witness in another framework: transformers computes the logits of what a run exports.
//!
//! `PYTHON=python3 cargo test -p atoll --test export -- --ignored`, with torch and transformers installed
//! for that Python. `ATOLL_MODEL=FOLDER` looks at a model folder instead of training a small one.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use atoll_cpu::{Generator, Precision};
use atoll_node::hf;
use common::{Lab, atoll, wait};

/// Trains a small model and exports it.
fn train() -> (Lab, String) {
    let lab = Lab::new(60_000, &[]);
    let mut coordinator = lab.coordinate();
    let mut site = lab.join("a", &lab.ticket("a"), &[]);
    lab.finish(&mut coordinator);
    assert!(wait(&mut site).success());
    let out = lab.path("export");
    assert!(atoll(&["export", &lab.path("run"), &out]).status.success());
    (lab, out)
}

#[test]
#[ignore = "needs a Python with torch and transformers, named by PYTHON"]
fn transformers_compute_the_same_logits() {
    let mut lab = None;
    let folder = std::env::var("ATOLL_MODEL").unwrap_or_else(|_| {
        let (trained, folder) = train();
        lab = Some(trained);
        folder
    });
    let (config, weights) = hf::load(Path::new(&folder)).unwrap();
    let length = config.max_position_embeddings.min(200) as u32;
    let tokens: Vec<u32> = (0..length).map(|i| (i * 37 + 11) % config.vocab_size as u32).collect();
    let ours = Generator::new(&config, &weights, Precision::F32, 2).unwrap().logits(&tokens).unwrap();

    let python = std::env::var("PYTHON").unwrap_or_else(|_| "python3".to_string());
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/logits.py");
    let mut child =
        Command::new(python).arg(script).arg(&folder).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(&serde_json::to_vec(&tokens).unwrap()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    let theirs: Vec<f32> = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(ours.len(), theirs.len());
    let differences = ours.iter().zip(&theirs).map(|(ours, theirs)| (ours - theirs).abs());
    let largest = differences.fold(0.0f32, f32::max);
    println!("largest difference of {} logits: {largest:e}", ours.len());
    assert!(largest < 1e-4, "{largest}");
    drop(lab);
}
