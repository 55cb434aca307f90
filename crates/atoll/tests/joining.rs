//! A site that comes late, over a thin link that breaks, in a process that is killed.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::time::Duration;

use common::cable::Cable;
use common::{LARGER, Lab, wait};

#[test]
fn what_has_come_of_the_model_is_not_fetched_twice_though_the_run_goes_on() {
    let lab = Lab::new(100_000_000, &LARGER);
    let coordinator = lab.coordinate();
    let _first = lab.join("a", &lab.ticket("a"), &[]);
    let begun = lab.wait_for("the first commits", |report| report.commits >= 4);
    let model = 4 * begun.parameters;

    let mut cable = Cable::lay(lab.listen(), "4mbit,20ms");
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
