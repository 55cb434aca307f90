//! A run from afar: each role may do what it is for and nothing else, and what is done is in the journal.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::fs;
use std::path::Path;

use atoll_core::journal::{Entry, Role};
use atoll_node::hf;
use common::{Lab, atoll, entries, signal, text, wait};

const LONG: u64 = 100_000_000;

/// A ticket for that role.
fn ticket(lab: &Lab, site: &str, role: &str) -> String {
    let printed = atoll(&["ticket", &lab.path("run"), site, "--address", &lab.listen(), "--role", role]);
    assert!(printed.status.success(), "{}", text(&printed.stderr));
    text(&printed.stdout).trim().to_string()
}

/// What `atoll remote` prints.
fn remote(lab: &Lab, dir: &str, ticket: &str, what: &[&str]) -> String {
    let done = atoll(&[&["remote", ticket, "--dir", &lab.path(dir)], what].concat());
    assert!(done.status.success(), "{what:?}: {}", text(&done.stderr));
    text(&done.stdout)
}

/// What it complains of.
fn refused(lab: &Lab, dir: &str, ticket: &str, what: &[&str]) -> String {
    let done = atoll(&[&["remote", ticket, "--dir", &lab.path(dir)], what].concat());
    let error = text(&done.stderr);
    assert!(!done.status.success() && error.contains("hint:"), "{what:?}: {error}");
    error
}

#[test]
fn observers_see_and_fetch_and_no_more() {
    let lab = Lab::new(LONG, &[]);
    let _coordinator = lab.coordinate();
    let a = lab.ticket("a");
    let _a = lab.join("a", &a, &["--share", "0.3"]);
    let observer = ticket(&lab, "looker", "observe");
    lab.wait_for("commits", |report| report.commits > 4);
    let seen = remote(&lab, "looker", &observer, &["status"]);
    assert!(seen.contains("training") && seen.contains("tok/s"), "{seen}");
    let json: serde_json::Value =
        serde_json::from_str(&remote(&lab, "looker", &observer, &["status", "--json"])).unwrap();
    assert!(json["commits"].as_u64().unwrap() > 4);

    let out = lab.path("model");
    remote(&lab, "looker", &observer, &["model", &out]);
    let (config, weights) = hf::load(Path::new(&out)).unwrap();
    assert_eq!(weights.len(), config.tensors().len());
    assert!(weights.iter().flatten().all(|weight| weight.is_finite()));
    let spoken = atoll(&["generate", &out, "--prompt", "reef", "--tokens", "4"]);
    assert!(spoken.status.success(), "{}", text(&spoken.stderr));
    assert!(refused(&lab, "looker", &observer, &["model", &out]).contains("holds a model already"));

    for what in [&["ticket", "friend"][..], &["revoke", "a"]] {
        assert!(refused(&lab, "looker", &observer, what).contains("--role administer"));
    }
    assert!(refused(&lab, "a-desk", &a, &["revoke", "looker"]).contains("already used by another key"));
    let (data, dir) = (lab.path("text"), lab.path("looker"));
    let joined = atoll(&["join", &observer, "--data", &data, "--dir", &dir, "--threads", "1"]);
    assert!(!joined.status.success() && text(&joined.stderr).contains("not invited to train, but to observe"));
    assert!(lab.status().unwrap().sites.iter().all(|site| site.name != "looker"), "it is no site");
}

#[test]
fn administrators_invite_and_revoke_and_the_journal_says_who() {
    let lab = Lab::new(LONG, &[]);
    let _coordinator = lab.coordinate();
    let boss = ticket(&lab, "boss", "administer");
    let invited = remote(&lab, "boss", &boss, &["ticket", "a"]).trim().to_string();
    let mut a = lab.join("a", &invited, &["--share", "0.3"]);
    lab.wait_for("commits", |report| report.commits > 2);
    assert!(remote(&lab, "boss", &boss, &["revoke", "a"]).contains("is revoked"));
    assert!(!wait(&mut a).success() && lab.log("a").contains("was revoked"), "{}", lab.log("a"));
    assert!(refused(&lab, "boss", &boss, &["revoke", "nobody"]).contains("knows no site nobody"));
    let unused = remote(&lab, "boss", &boss, &["ticket", "b", "--role", "observe"]).trim().to_string();
    remote(&lab, "boss", &boss, &["revoke", "b"]);
    assert!(refused(&lab, "b", &unused, &["status"]).contains("was withdrawn"));

    let boss = Some("boss".parse().unwrap());
    let acts = entries(&lab.run());
    assert!(acts.iter().any(|entry| matches!(entry, Entry::Invited { invitation, by, .. }
        if *by == boss && invitation.site.to_string() == "b" && invitation.role == Role::Observe)));
    assert!(
        acts.iter()
            .any(|entry| matches!(entry, Entry::Revoked { site, by, .. } if *by == boss && site.to_string() == "a"))
    );
    assert!(acts.iter().any(|entry| matches!(entry, Entry::Withdrawn { by, .. } if *by == boss)));
}

#[test]
fn a_site_replaces_its_key() {
    let lab = Lab::new(LONG, &[]);
    let mut coordinator = lab.coordinate();
    let invited = lab.ticket("a");
    let mut a = lab.join("a", &invited, &["--share", "0.3"]);
    lab.wait_for("commits", |report| report.commits > 2);
    assert!(refused(&lab, "a", &invited, &["rekey"]).contains("in use by another process"));
    signal(&a, "TERM");
    assert!(wait(&mut a).success());

    let key = Path::new(&lab.path("a")).join("site.key");
    let next = key.with_extension("key.next");
    let old = fs::read(&key).unwrap();
    assert!(remote(&lab, "a", &invited, &["rekey"]).contains("a has a new key"));
    let new = fs::read(&key).unwrap();
    assert!(old != new && !next.exists());
    // The earlier one is of no use to whoever has a copy.
    fs::create_dir_all(lab.path("thief")).unwrap();
    fs::write(Path::new(&lab.path("thief")).join("site.key"), &old).unwrap();
    assert!(refused(&lab, "thief", &invited, &["status"]).contains("was replaced by a newer one"));
    // As if we had died before we heard that it is done: the same again finishes it.
    fs::write(&key, &old).unwrap();
    fs::write(&next, &new).unwrap();
    remote(&lab, "a", &invited, &["rekey"]);
    assert!(fs::read(&key).unwrap() == new && !next.exists());

    let before = lab.status().unwrap().commits;
    let _a = lab.join("a", &invited, &["--share", "0.3"]);
    let report = lab.wait_for("the run to go on", |report| report.commits > before + 4);
    assert_eq!(report.sites.len(), 1, "it is the same site");
    lab.stop(&mut coordinator);
    lab.replay();
}
