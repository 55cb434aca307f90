//! A site that comes late, over a thin link that breaks, in a process that is killed.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::time::{Duration, Instant};

use atoll_node::wan::{Relay, relay};
use common::{Lab, wait};

/// About 700,000 weights.
const MODEL: [(&str, &str); 5] = [
    ("hidden_size = 32", "hidden_size = 128"),
    ("intermediate_size = 64", "intermediate_size = 256"),
    ("num_hidden_layers = 1", "num_hidden_layers = 4"),
    ("num_attention_heads = 2", "num_attention_heads = 4"),
    ("head_dim = 16", "head_dim = 32"),
];

/// A link that can be cut: what goes over it is counted over all its lives.
struct Cable {
    runtime: tokio::runtime::Runtime,
    relay: Option<Relay>,
    address: String,
    target: String,
    before: u64,
}

impl Cable {
    fn lay(target: String) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let mut cable = Self { runtime, relay: None, address: "127.0.0.1:0".to_string(), target, before: 0 };
        cable.mend();
        cable
    }

    fn mend(&mut self) {
        let wan = "4mbit,20ms".parse().unwrap();
        let relay = self.runtime.block_on(relay(wan, &self.address, &self.target, 1)).unwrap();
        self.address = relay.address().to_string();
        self.relay = Some(relay);
    }

    fn cut(&mut self) {
        self.before = self.down();
        self.relay = None;
    }

    /// Bytes that were sent to the site.
    fn down(&self) -> u64 {
        self.before + self.relay.as_ref().map_or(0, |relay| relay.bytes().1)
    }

    fn wait_for(&self, bytes: u64) {
        let began = Instant::now();
        while self.down() < bytes {
            assert!(began.elapsed() < Duration::from_secs(120), "{} of {bytes} bytes came", self.down());
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

#[test]
fn what_has_come_of_the_model_is_not_fetched_twice_though_the_run_goes_on() {
    let lab = Lab::new(100_000_000, &MODEL);
    let coordinator = lab.coordinate();
    let _first = lab.join("a", &lab.ticket("a"), &[]);
    let begun = lab.wait_for("the first commits", |report| report.commits >= 4);
    let model = 4 * begun.parameters;

    let mut cable = Cable::lay(lab.listen());
    let ticket = lab.ticket_at("b", &cable.address);
    let mut late = lab.join("b", &ticket, &[]);
    cable.wait_for(model / 3);
    cable.cut();
    std::thread::sleep(Duration::from_millis(300));
    cable.mend();
    cable.wait_for(2 * model / 3);
    late.0.kill().unwrap();
    late.0.wait().unwrap();
    let killed = lab.status().unwrap().commits;
    let mut late = lab.join("b", &ticket, &[]);
    let report = lab.wait_for("the late site to train", |report| {
        report.sites.iter().any(|site| site.name == "b" && site.state == "training")
    });
    assert!(report.commits > begun.commits + 4, "the run stood still: {} commits then, {killed} later", begun.commits);
    // A commit speaks of a quarter of the weights, in half a bit each instead of 32; a slow machine makes many meanwhile.
    const COMMIT: f64 = 0.5 / 32.0 / 4.0;
    let commits = (report.commits - begun.commits) as f64;
    let share = cable.down() as f64 / model as f64;
    assert!(share < 1.5 + commits * COMMIT, "the late site was sent {share:.2} models beside {commits} commits");

    common::signal(&late, "INT");
    assert!(wait(&mut late).success(), "{}", lab.log("b"));
    drop(coordinator);
}
