//! The demo as a newcomer runs it. It takes a minute, so it runs only when asked for:
//! `cargo test --release -p atoll --test demo -- --ignored`.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use common::{Process, atoll, signal, text, wait};
use serde_json::Value;

fn demo(out: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_atoll"));
    command.args(["demo", "--json", "--out"]).arg(out).args(more).stdin(Stdio::null());
    command
}

#[test]
#[ignore = "takes a minute"]
fn a_minute_of_demo_learns_and_reports() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("demo");
    let output = demo(&out, &["--minutes", "1"]).stderr(Stdio::inherit()).output().unwrap();
    assert!(output.status.success());
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["state"], "finished");
    assert!(report["tokens"].as_u64().unwrap() > 0 && report["commits"].as_u64().unwrap() > 0);
    let (first, last) = (&report["bits_per_byte"]["first"], &report["bits_per_byte"]["last"]);
    assert!(last.as_f64().unwrap() < first.as_f64().unwrap() - 0.3, "{first} → {last}");
    assert!(report["loss"]["last"].as_f64().unwrap() < report["loss"]["first"].as_f64().unwrap());
    let sites = report["sites"].as_array().unwrap();
    assert_eq!(sites.len(), 3);
    for site in sites {
        assert_eq!(site["digest_mismatches"], 0, "{site}");
        assert!(site["contributions"].as_u64().unwrap() > 0, "{site}");
        for key in ["name", "engine", "device", "tokens", "steps", "tokens_per_second", "utilization"] {
            assert!(!site[key].is_null(), "{key} is missing: {site}");
        }
        assert!(site["bytes_sent"].as_u64().unwrap() > 0 && site["bytes_received"].as_u64().unwrap() > 0);
    }
    for file in ["report.json", "journal.jsonl", "model/model.safetensors", "model/config.json", "model/tokenizer.json"]
    {
        assert!(out.join(file).exists(), "{file} is missing");
    }
    let replayed = atoll(&["replay", &out.to_string_lossy()]);
    assert!(replayed.status.success(), "{}", text(&replayed.stderr));
}

/// Runs a short demo, interrupts it after some commits and goes on; the report and what was said last.
fn interrupted(more: &[&str], then: &[&str]) -> (Value, String) {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("demo");
    let words = folder.path().join("words.txt");
    fs::write(&words, "the tide comes in and the tide goes out\n".repeat(3000)).unwrap();
    let arguments = ["--data", words.to_str().unwrap(), "--tokens", "400000", "--sites", "2"];
    let child = demo(&out, &arguments).args(more).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let mut child = Process(child);
    let status = out.join("status.json");
    let commits = || {
        let report: Option<Value> = fs::read(&status).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        report.and_then(|report| report["commits"].as_u64()).unwrap_or(0)
    };
    while commits() < 4 {
        assert!(child.0.try_wait().unwrap().is_none(), "the demo ended before it was interrupted");
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    signal(&child, "INT");
    assert!(wait(&mut child).success());
    let before = commits();
    let output = demo(&out, &arguments).args(then).output().unwrap();
    let said = text(&output.stderr);
    assert!(output.status.success(), "{said}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(report["commits"].as_u64().unwrap() > before, "{report}");
    assert!(report["tokens"].as_u64().unwrap() >= 400_000);
    (report, said)
}

#[test]
#[ignore = "takes a minute"]
fn an_interrupted_demo_goes_on() {
    interrupted(&[], &[]);
}

#[test]
#[ignore = "takes a minute"]
fn a_demo_goes_on_over_other_links() {
    let (report, said) = interrupted(&["--wan", "20mbit,40ms,0.5%"], &["--wan", "10mbit,80ms,5ms,1%"]);
    assert!(said.contains("10mbit each way, 80 ms round trip"), "{said}");
    for site in report["sites"].as_array().unwrap() {
        assert_eq!(site["digest_mismatches"], 0, "{site}");
        let link = format!("link     {}, 10mbit,80ms,5ms,1%: ↑ ", site["name"].as_str().unwrap());
        let line = said.lines().find(|line| line.starts_with(&link)).unwrap_or_else(|| panic!("{link} in {said}"));
        assert!(line.contains("iB, ↓ ") && line.ends_with("iB"), "more than greetings went both ways: {line}");
    }
}
