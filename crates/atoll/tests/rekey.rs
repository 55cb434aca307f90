//! The coordinators of a run get another key: sites that were told go over to it, and nobody believes the earlier one any more.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::fs;
use std::time::{Duration, Instant};

use common::{Lab, atoll, text, wait};

/// By how many keys a site knows coordinators.
fn keys(lab: &Lab, site: &str) -> usize {
    let remembered = fs::read(format!("{}/coordinator.keys", lab.path(site))).unwrap_or_default();
    let remembered: serde_json::Value = serde_json::from_slice(&remembered).unwrap_or_default();
    remembered["keys"].as_array().map_or(0, Vec::len)
}

fn wait_for_keys(lab: &Lab, site: &str, count: usize) {
    let began = Instant::now();
    while keys(lab, site) != count {
        assert!(began.elapsed() < Duration::from_secs(60), "{site} knows {} keys: {}", keys(lab, site), lab.log(site));
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn refused(arguments: &[&str]) -> String {
    let done = atoll(arguments);
    let error = text(&done.stderr);
    assert!(!done.status.success() && error.contains("hint:"), "{arguments:?}: {error}");
    error
}

#[test]
fn sites_that_were_told_go_over_to_the_next_key_and_leave_the_earlier_one() {
    let lab = Lab::new(100_000_000, &[]);
    let (run, key) = (lab.path("run"), lab.run().join("coordinator.key"));
    let mut coordinator = lab.coordinate();
    let mut a = lab.join("a", &lab.ticket("a"), &["--share", "0.4"]);
    let unused = lab.ticket("b");
    lab.wait_for("commits", |report| report.commits > 4);
    assert!(refused(&["rekey", &run, "--finish"]).contains("in use"));

    let announced = atoll(&["rekey", &run]);
    assert!(announced.status.success(), "{}", text(&announced.stderr));
    assert!(text(&announced.stdout).contains("the next key is"), "{}", text(&announced.stdout));
    wait_for_keys(&lab, "a", 2);
    lab.stop(&mut coordinator);
    let earlier = fs::read(&key).unwrap();
    let finished = atoll(&["rekey", &run, "--finish"]);
    assert!(finished.status.success(), "{}", text(&finished.stderr));
    assert!(refused(&["rekey", &run, "--finish"]).contains("has no next key"));

    let before = lab.status().unwrap().commits;
    let mut coordinator = lab.coordinate();
    lab.wait_for("the site to come over", |report| {
        report.commits > before + 4 && report.sites.iter().any(|site| site.state == "training")
    });
    wait_for_keys(&lab, "a", 1);
    let mut b = lab.join("b", &unused, &[]);
    assert!(!wait(&mut b).success() && lab.log("b").contains("another key than this site knows"), "{}", lab.log("b"));

    // Somebody who has got hold of the earlier key.
    lab.stop(&mut coordinator);
    fs::write(&key, earlier).unwrap();
    let _impostor = lab.coordinate();
    assert!(!wait(&mut a).success() && lab.log("a").contains("another key than this site knows"), "{}", lab.log("a"));
}

#[test]
fn a_key_that_nobody_was_told_of_is_not_put_in_place() {
    let lab = Lab::new(100_000_000, &[]);
    let run = lab.path("run");
    let announced = atoll(&["rekey", &run]);
    assert!(text(&announced.stdout).contains("no coordinator is running"), "{}", text(&announced.stderr));
    assert!(refused(&["rekey", &run, "--finish"]).contains("does not speak of the key"));
}
