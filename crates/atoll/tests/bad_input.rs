//! Bad input ends in one clear sentence with a hint, a non-zero exit code, and nothing lost.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use atoll_core::engine::{Batch, Engine, EngineError, Evaluation, Progress};
use atoll_core::hash::Digest;
use atoll_core::manifest::{FragmentId, Manifest};
use atoll_core::wire::{Frame, Hello, Purpose};
use atoll_node::identity::{Identity, Ticket};
use atoll_node::link::{Dialer, read_frame, write_frame};
use atoll_node::report::Report;
use atoll_node::site::join;
use common::engine::Scripted;
use common::{Lab, atoll, text, wait};

/// The command fails with a sentence that holds all of `words`, and with a hint.
fn fails(arguments: &[&str], words: &[&str]) {
    let output = atoll(arguments);
    let said = text(&output.stderr);
    assert!(!output.status.success(), "{arguments:?} must fail");
    assert!(said.contains("error: ") && said.contains("hint: "), "{arguments:?}: {said}");
    words.iter().for_each(|word| assert!(said.contains(word), "{arguments:?} does not say {word}: {said}"));
    assert!(!said.contains("panicked"), "{said}");
}

#[test]
fn folders_and_files() {
    let lab = Lab::new(1000, &[]);
    let (run, nowhere) = (lab.path("run"), lab.path("nowhere"));
    fails(&["new", &run], &["is a run folder already"]);
    fails(&["new", &nowhere, "--data", &lab.path("missing")], &["missing"]);
    fs::create_dir(lab.path("empty")).unwrap();
    fails(&["new", &nowhere, "--data", &lab.path("empty")], &["empty"]);
    fails(&["new", &nowhere, "--data", &lab.path("text"), "--preset", "huge"], &["huge", "nano"]);
    fails(&["demo", "--out", &nowhere, "--wan", "50mb"], &["--wan", "'50mb' is no part of a link"]);
    fails(&["coordinate", &nowhere], &["run.toml"]);
    fails(&["status", &nowhere], &["status.json"]);
    fails(&["generate", &nowhere, "--prompt", "x"], &["there is no model"]);
    fails(&["replay", &run], &["no snapshot"]);
    fails(&["ingest", &lab.path("missing"), "--run", &run, "--out", &lab.path("shards")], &["missing"]);
    fails(&["ticket", &run, "oslo"], &["--address"]);
    assert!(!lab.folder.path().join("nowhere").exists(), "a failed command must leave nothing behind");
}

#[test]
fn a_malformed_run_toml() {
    let lab = Lab::new(1000, &[]);
    lab.change("learning_rate = 1.5e-3", "learning_rate = -1.0");
    lab.change("fragments = 4", "fragments = 0");
    fails(&["check", &lab.path("run")], &["2 problems", "learning_rate", "fragments"]);
    lab.change("[sync]", "[sink]");
    fails(&["check", &lab.path("run")], &["run.toml", "sink"]);
    fails(&["coordinate", &lab.path("run")], &["run.toml", "sink"]);
}

#[test]
fn a_changed_model_is_not_mistaken_for_the_runs() {
    let lab = Lab::new(1_000_000, &[]);
    let coordinator = lab.coordinate();
    lab.wait_for("the run to begin", |report| report.state == "training");
    drop(coordinator);
    lab.change("seed = 1", "seed = 2");
    fails(&["coordinate", &lab.path("run"), "--listen", &lab.listen()], &["seed 2", "began with 1"]);
    lab.change("seed = 2", "seed = 1");
    lab.change("hidden_size = 32", "hidden_size = 64");
    fails(&["coordinate", &lab.path("run"), "--listen", &lab.listen()], &["another model than the run began with"]);
    lab.change("hidden_size = 64", "hidden_size = 32");
    lab.change("fragments = 4", "fragments = 3");
    fails(&["coordinate", &lab.path("run"), "--listen", &lab.listen()], &["another layout than the run began with"]);
    lab.change("fragments = 3", "fragments = 4");
    lab.coordinate();
}

#[test]
fn ports_and_devices() {
    let lab = Lab::new(1000, &[]);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    fails(&["coordinate", &lab.path("run"), "--listen", &address], &[&address, "--listen"]);
    let ticket = lab.ticket("oslo");
    fails(&["join", &ticket, "--device", "abacus"], &["no device 'abacus'", "cpu"]);
    let _coordinator = lab.coordinate();
    fails(&["coordinate", &lab.path("run"), "--listen", "127.0.0.1:0"], &["in use by another process"]);
}

#[test]
fn tickets() {
    let lab = Lab::new(100_000_000, &[]);
    let _coordinator = lab.coordinate();
    let (ticket, data) = (lab.ticket("oslo"), lab.path("text"));
    let join = |ticket: &str, dir: &str, words: &[&str]| {
        fails(&["join", ticket, "--data", &data, "--dir", &lab.path(dir)], words);
    };
    join("hello", "x", &["no ticket"]);
    join(&ticket[..ticket.len() - 4], "x", &["damaged or cut short"]);
    let site = lab.join("oslo", &ticket, &[]);
    lab.wait_for("oslo to train", |report| report.sites.iter().any(|site| site.steps > 0));
    join(&ticket, "thief", &["already used by another key"]);
    let forged = Ticket { secret: Digest::of(b"guess"), ..Ticket::from_text(&ticket).unwrap() };
    join(&forged.to_text(), "forger", &["not one of this run's"]);
    let foreign = Ticket { coordinator: Digest::of(b"other"), ..Ticket::from_text(&lab.ticket("rome")).unwrap() };
    join(&foreign.to_text(), "rome", &["another key than this site knows"]);
    join(&lab.ticket("oslo"), "twin", &["oslo belongs to a site with another key"]);
    drop(site);
}

#[test]
fn data_of_another_tokenizer() {
    let lab = Lab::new(100_000_000, &[]);
    let other = atoll(&["new", &lab.path("other"), "--data", &lab.path("text"), "--vocab", "280"]);
    assert!(other.status.success());
    let shards = lab.path("shards");
    let ingested = atoll(&["ingest", &lab.path("text"), "--run", &lab.path("other"), "--out", &shards]);
    assert!(ingested.status.success(), "{}", text(&ingested.stderr));
    let _coordinator = lab.coordinate();
    let (ticket, dir) = (lab.ticket("oslo"), lab.path("oslo"));
    fails(&["join", &ticket, "--data", &shards, "--dir", &dir], &["tokenizer"]);
    let ours = lab.path("ours");
    assert!(atoll(&["ingest", &lab.path("text"), "--run", &lab.path("run"), "--out", &ours]).status.success());
    let shard = fs::read_dir(&ours)
        .unwrap()
        .flatten()
        .map(|file| file.path())
        .find(|path| path.extension().is_some_and(|extension| extension != "json" && extension != "lock"));
    let shard = shard.unwrap();
    let bytes = fs::read(&shard).unwrap();
    fs::write(&shard, &bytes[..bytes.len() / 2]).unwrap();
    let name = shard.file_name().unwrap().to_string_lossy().into_owned();
    fails(&["join", &ticket, "--data", &ours, "--dir", &dir], &[&name]);
}

#[test]
fn a_truncated_model() {
    let lab = Lab::new(1_000_000, &[]);
    let coordinator = lab.coordinate();
    lab.wait_for("the run to begin", |report| report.state == "training");
    drop(coordinator);
    let out = lab.path("export");
    assert!(atoll(&["export", &lab.path("run"), &out]).status.success());
    let file = PathBuf::from(&out).join("model.safetensors");
    let bytes = fs::read(&file).unwrap();
    fs::write(&file, &bytes[..bytes.len() - 100]).unwrap();
    fails(&["generate", &out, "--prompt", "x"], &["model.safetensors"]);
}

/// A file-size limit stands in for a full disk: writes fail, and the journal must stay readable.
#[test]
#[cfg(unix)]
fn a_full_disk_stops_the_coordinator_and_loses_nothing() {
    let lab = Lab::new(400_000, &[]);
    let limited = format!(
        "trap '' XFSZ; ulimit -f 200; exec {} coordinate {} --listen {}",
        env!("CARGO_BIN_EXE_atoll"),
        lab.path("run"),
        lab.listen()
    );
    let log = fs::File::create(lab.path("coordinator.log")).unwrap();
    let child = Command::new("sh")
        .args(["-c", &limited])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap();
    let mut coordinator = common::Process(child);
    let ticket = lab.ticket("a");
    let mut site = lab.join("a", &ticket, &[]);
    // 200 blocks of 512 bytes or 1 KiB: the journal gets there, and so may a snapshot.
    let status = wait(&mut coordinator);
    let said = lab.log("coordinator");
    assert!(!status.success(), "{said}");
    assert!(said.contains("cannot be written") && said.contains("hint: "), "{said}");
    let mut coordinator = lab.coordinate();
    let report = lab.finish(&mut coordinator);
    assert!(wait(&mut site).success(), "{}", lab.log("a"));
    assert!(report.tokens >= 400_000);
    lab.replay();
}

/// Speaks to a coordinator by hand.
fn greet(lab: &Lab, site: &str, frame: impl FnOnce(&Ticket) -> Frame) -> Option<Frame> {
    let ticket = Ticket::from_text(&lab.ticket(site)).unwrap();
    let identity = Identity::load_or_create(&PathBuf::from(lab.path(&format!("{site}.key")))).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut link = Dialer::new(&identity, ticket.coordinator).unwrap().dial(&lab.listen()).await.unwrap();
        write_frame(&mut link, &frame(&ticket)).await.unwrap();
        read_frame(&mut link).await.unwrap()
    })
}

#[test]
fn other_protocols_and_other_layouts_are_refused() {
    let lab = Lab::new(1_000_000, &[]);
    let _coordinator = lab.coordinate();
    let answer = greet(&lab, "old", |_| Frame::Hello { protocol: 99, hello: None });
    let Some(Frame::Refused(why)) = answer else { panic!("{answer:?}") };
    assert!(why.contains("protocol 99") && why.contains("hint:"), "{why}");
    let answer = greet(&lab, "odd", |ticket| {
        Frame::hello(Hello {
            purpose: Purpose::Control,
            secret: Some(ticket.secret.0),
            successor: None,
            layout: Some(Digest::of(b"another")),
            engine: "odd".into(),
            device: "odd".into(),
        })
    });
    let Some(Frame::Refused(why)) = answer else { panic!("{answer:?}") };
    assert!(why.contains("layout") && why.contains("hint:"), "{why}");
}

/// An engine whose weights turn bad after some steps.
struct Rotten {
    manifest: Manifest,
    steps: u32,
}

impl Engine for Rotten {
    fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    fn train(&mut self, steps: u32) -> Result<Progress, EngineError> {
        self.steps += steps;
        Ok(Progress { steps, tokens: 128, loss: 1.0 })
    }

    fn read(&mut self, _: FragmentId, weights: &mut [f32]) -> Result<(), EngineError> {
        weights.fill(if self.steps > 3 { f32::NAN } else { 0.0 });
        Ok(())
    }

    fn write(&mut self, _: FragmentId, _: &[f32]) -> Result<(), EngineError> {
        Ok(())
    }

    fn evaluate(&mut self, batch: &Batch) -> Result<Evaluation, EngineError> {
        Ok(Evaluation { nats: 1.0, tokens: (batch.rows * batch.length) as u64 })
    }
}

#[test]
fn weights_that_are_not_finite_never_leave_their_site() {
    let lab = Lab::new(40_000, &[]);
    let mut coordinator = lab.coordinate();
    let make =
        |parts: atoll_node::site::Parts| Ok(Box::new(Rotten { manifest: parts.manifest, steps: 0 }) as Box<dyn Engine>);
    let error = join(&lab.site_options("rotten"), make, &Arc::new(AtomicBool::new(false)), &mut |_| {}).unwrap_err();
    assert!(format!("{error:#}").contains("not finite"), "{error:#}");
    let mut site = lab.join("a", &lab.ticket("a"), &[]);
    let report = lab.finish(&mut coordinator);
    assert!(wait(&mut site).success());
    assert!(report.tokens >= 40_000);
    lab.replay();
}

#[test]
fn a_site_that_diverges_names_the_step_the_tensor_and_the_last_good_commit() {
    let lab = Lab::new(1_000_000_000, &[]);
    let _coordinator = lab.coordinate();
    let status = lab.run().join("status.json");
    let make = |parts: atoll_node::site::Parts| {
        let script = move |step: u64, weights: &mut [Vec<f32>]| {
            // A fragment's second commit holds work of this, the only site, on top of the first.
            let commits = Report::load(&status).map_or(0, |report| report.commits);
            if commits > weights.len() as u64 {
                let what = "the gradient of model.layers.0.mlp.up_proj.weight".to_string();
                return Err(EngineError::NonFinite { what, step });
            }
            for (weights, change) in weights.iter_mut().zip(1..) {
                weights.iter_mut().for_each(|weight| *weight += 1e-3 * change as f32);
            }
            Ok(())
        };
        Ok(Box::new(Scripted::new(parts, script)) as Box<dyn Engine>)
    };
    let error = join(&lab.site_options("wild"), make, &Arc::new(AtomicBool::new(false)), &mut |_| {}).unwrap_err();
    let said = format!("{error:#}");
    assert!(
        said.contains("the gradient of model.layers.0.mlp.up_proj.weight became non-finite at inner step "),
        "{said}"
    );
    assert!(said.contains("hint: lower the learning rate"), "{said}");
    let (_, good) = said.split_once("the last good commit is version ").expect(&said);
    let (version, fragment) = good.split_once(" of fragment ").expect(&said);
    assert!(
        version.parse::<u64>().unwrap() > 0 && fragment.starts_with(|digit: char| digit.is_ascii_digit()),
        "{said}"
    );
}
