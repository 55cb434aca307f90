//! A run on this machine with real processes, small enough to finish in seconds.

#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]

pub mod cable;
pub mod engine;
pub mod s3;

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use atoll_core::journal::{Chain, Entry};
use atoll_core::wire::{Frame, Hello, Purpose};
use atoll_node::journal::read_entries;
use atoll_node::link::{Dialer, Link, read_frame, write_frame};
use atoll_node::report::Report;
use tempfile::TempDir;

/// Nothing here takes this long unless it hangs.
const PATIENCE: Duration = Duration::from_secs(120);

/// Changes to `run.toml` that make it about 700,000 weights, and commits light for its many rounds.
pub const LARGER: [(&str, &str); 8] = [
    ("steps = 8", "steps = 32"),
    ("up = \"auto\"", "up = \"sparse:96\""),
    ("down = \"auto\"", "down = \"sparse:224\""),
    ("hidden_size = 32", "hidden_size = 128"),
    ("intermediate_size = 64", "intermediate_size = 256"),
    ("num_hidden_layers = 1", "num_hidden_layers = 4"),
    ("num_attention_heads = 2", "num_attention_heads = 4"),
    ("head_dim = 16", "head_dim = 32"),
];

pub struct Lab {
    pub folder: TempDir,
    port: u16,
    /// What its processes find in their environment.
    pub environment: Vec<(&'static str, &'static str)>,
}

/// A child process that does not outlive its test.
pub struct Process(pub Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub fn atoll(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_atoll")).args(arguments).stdin(Stdio::null()).output().unwrap()
}

/// All entries of a run folder's journal.
pub fn entries(run: &Path) -> Vec<Entry> {
    read_entries(&run.join("journal.jsonl"), 0, Chain::default()).unwrap()
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

impl Lab {
    /// A run folder `run` for a model of about 20,000 weights, some text, and lines put into `run.toml`.
    pub fn new(tokens: u64, changes: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let lab = Self { folder, port, environment: Vec::new() };
        lab.write_text("text", 60);
        let (run, data) = (lab.path("run"), lab.path("text"));
        let made = atoll(&[
            "new",
            &run,
            "--data",
            &data,
            "--vocab",
            "300",
            "--preset",
            "nano",
            "--tokens",
            &tokens.to_string(),
        ]);
        assert!(made.status.success(), "{}", text(&made.stderr));
        lab.change("preset = \"nano\"", SMALL);
        lab.change("context = 256", "context = 32");
        lab.change("steps = \"auto\"", "steps = 8");
        lab.change("snapshot_seconds = 60.0", "snapshot_seconds = 2.0");
        lab.change("keep = \"snapshots\"", "keep = \"all\"");
        changes.iter().for_each(|(from, to)| lab.change(from, to));
        lab
    }

    pub fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_string_lossy().into_owned()
    }

    pub fn run(&self) -> PathBuf {
        self.folder.path().join("run")
    }

    /// Documents of words, different for every number.
    pub fn write_text(&self, name: &str, documents: usize) {
        let folder = self.folder.path().join(name);
        fs::create_dir_all(&folder).unwrap();
        let words = ["reef", "tide", "palm", "shell", "current", "island", "lagoon", "coral", "sand", "wave"];
        for document in 0..documents {
            let mut rng = atoll_core::rng::Rng::new(document as u64);
            let text: Vec<&str> = (0..600).map(|_| words[rng.below(10) as usize]).collect();
            fs::write(folder.join(format!("{document:03}.txt")), text.join(" ")).unwrap();
        }
    }

    /// Replaces a line of `run.toml`.
    pub fn change(&self, from: &str, to: &str) {
        let path = self.run().join("run.toml");
        let before = fs::read_to_string(&path).unwrap();
        assert!(before.contains(from), "run.toml does not say {from}");
        fs::write(path, before.replacen(from, to, 1)).unwrap();
    }

    pub fn listen(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub fn coordinate(&self) -> Process {
        let mut process = self.spawn("coordinator", &["coordinate", &self.path("run"), "--listen", &self.listen()]);
        let address = self.listen();
        let began = Instant::now();
        while std::net::TcpStream::connect(&address).is_err() {
            let is_hopeless = began.elapsed() > PATIENCE || process.0.try_wait().unwrap().is_some();
            assert!(!is_hopeless, "{}", self.log("coordinator"));
            std::thread::sleep(Duration::from_millis(20));
        }
        process
    }

    /// Stops the coordinator in good order.
    pub fn stop(&self, coordinator: &mut Process) {
        signal(coordinator, "TERM");
        assert!(wait(coordinator).success(), "{}", self.log("coordinator"));
    }

    pub fn ticket(&self, site: &str) -> String {
        self.ticket_at(site, &self.listen())
    }

    /// A ticket for a site that reaches the coordinator at another address.
    pub fn ticket_at(&self, site: &str, address: &str) -> String {
        let printed = atoll(&["ticket", &self.path("run"), site, "--address", address]);
        assert!(printed.status.success(), "{}", text(&printed.stderr));
        text(&printed.stdout).trim().to_string()
    }

    pub fn join(&self, site: &str, ticket: &str, more: &[&str]) -> Process {
        let (data, dir) = (self.path("text"), self.path(site));
        let mut arguments = vec!["join", ticket, "--data", &data, "--dir", &dir];
        arguments.extend(more);
        if !more.contains(&"--threads") {
            arguments.extend(["--threads", "1"]);
        }
        self.spawn(site, &arguments)
    }

    pub fn spawn(&self, name: &str, arguments: &[&str]) -> Process {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.path(&format!("{name}.log"))).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_atoll"))
            .args(arguments)
            .envs(self.environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        Process(child)
    }

    pub fn log(&self, name: &str) -> String {
        fs::read_to_string(self.path(&format!("{name}.log"))).unwrap_or_default()
    }

    pub fn status(&self) -> Option<Report> {
        Report::load(&self.run().join("status.json")).ok()
    }

    /// Waits until the run says something about itself.
    pub fn wait_for(&self, what: &str, holds: impl Fn(&Report) -> bool) -> Report {
        let began = Instant::now();
        loop {
            match self.status() {
                Some(report) if holds(&report) => return report,
                seen => assert!(
                    began.elapsed() < PATIENCE,
                    "waiting for {what}: {seen:?}\n{}\n{}",
                    self.log("coordinator"),
                    self.log("a")
                ),
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Waits for the coordinator's good end and returns the report.
    pub fn finish(&self, coordinator: &mut Process) -> Report {
        let status = wait(coordinator);
        assert!(status.success(), "{}", self.log("coordinator"));
        Report::load(&self.run().join("report.json")).unwrap()
    }

    /// The journal, the ledger and every digest must add up.
    pub fn replay(&self) -> String {
        let replayed = atoll(&["replay", &self.path("run")]);
        assert!(replayed.status.success(), "{}", text(&replayed.stderr));
        text(&replayed.stdout)
    }
}

pub fn wait(process: &mut Process) -> std::process::ExitStatus {
    let began = Instant::now();
    loop {
        if let Some(status) = process.0.try_wait().unwrap() {
            return status;
        }
        assert!(began.elapsed() < PATIENCE, "a process does not end");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Sends a signal by name.
pub fn signal(process: &Process, name: &str) {
    let sent = Command::new("kill").args([format!("-{name}"), process.0.id().to_string()]).status().unwrap();
    assert!(sent.success());
}

const SMALL: &str = "preset = \"nano\"\nhidden_size = 32\nintermediate_size = 64\nnum_hidden_layers = 1\nnum_attention_heads = 2\nnum_key_value_heads = 1\nhead_dim = 16";

/// Greets whoever is at that address: the connection, and what was answered, if anything was.
pub async fn greet(
    dialer: &Dialer,
    address: &str,
    secret: Option<[u8; 32]>,
    purpose: Purpose,
) -> (Link, Option<Frame>) {
    let mut link = dialer.dial(address).await.unwrap();
    let (engine, device) = ("none".to_string(), "none".to_string());
    let hello = Hello { purpose, secret, successor: None, layout: None, engine, device };
    write_frame(&mut link, &Frame::hello(hello)).await.unwrap();
    let answer = read_frame(&mut link).await.unwrap_or(None);
    (link, answer)
}
