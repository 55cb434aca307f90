//! Back to an earlier commit: model and ledger together, with a site that goes on meanwhile and has later weights.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::path::Path;

use atoll_core::journal::{Book, Entry};
use atoll_node::run::RunDir;
use atoll_node::snapshot;
use common::{Lab, atoll, text};

const LONG: u64 = 100_000_000;

fn roll_back(lab: &Lab, to: u64) -> std::process::Output {
    atoll(&["rollback", &lab.path("run"), "--to", &to.to_string()])
}

/// All entries, every one of which follows, with a ledger that adds up after each.
fn entries(run: &Path) -> (Book, Vec<Entry>) {
    let entries = common::entries(run);
    let mut book = Book::default();
    for entry in &entries {
        book.apply(entry).unwrap();
        assert_eq!(book.ledger.verify(), Ok(()));
    }
    assert_eq!(book.tokens, book.ledger.consumed() * book.context, "a gap or an overlap");
    (book, entries)
}

#[test]
fn a_run_goes_back_and_then_on_and_every_token_is_counted_once() {
    let lab = Lab::new(LONG, &[]);
    let mut coordinator = lab.coordinate();
    let tickets = ["a", "b"].map(|name| lab.ticket(name));
    let _a = lab.join("a", &tickets[0], &["--share", "0.4"]);
    lab.wait_for("some commits", |report| report.commits >= 12);
    // Whoever comes in or is revoked later stays in, or out.
    let b = lab.join("b", &tickets[1], &["--share", "0.4"]);
    let seen = lab.wait_for("b to contribute", |report| report.sites.iter().all(|site| site.contributions > 0));
    assert!(atoll(&["revoke", &lab.path("run"), "b"]).status.success());
    let living = roll_back(&lab, 9);
    assert!(!living.status.success() && text(&living.stderr).contains("in use"), "{}", text(&living.stderr));
    lab.wait_for("more commits", |report| report.commits >= seen.commits + 4);
    lab.stop(&mut coordinator);
    drop(b);
    let before = entries(&lab.run()).0;

    // What cannot be reached is refused, and nothing has changed.
    for (to, words) in [(before.commits(), "already"), (before.commits() + 1, "goes from commit 0 to commit")] {
        let refused = roll_back(&lab, to);
        let error = text(&refused.stderr);
        assert!(!refused.status.success() && error.contains(words) && error.contains("hint:"), "{error}");
    }
    assert_eq!(entries(&lab.run()).0, before);

    let rolled = roll_back(&lab, 9);
    assert!(rolled.status.success(), "{}", text(&rolled.stderr));
    let (book, all) = entries(&lab.run());
    assert_eq!(book.commits(), 9);
    assert!(book.tokens < before.tokens && !book.sites.values().any(|member| member.open));
    assert_eq!((&book.revoked, &book.tickets), (&before.revoked, &before.tickets));
    assert!(matches!(all.last(), Some(Entry::RolledBack { to: 9, .. })));
    assert!(lab.replay().contains("9 commits computed again, all digests equal"));

    // What was is whole.
    let aside = std::fs::read_dir(lab.run().join("set-aside")).unwrap().next().unwrap().unwrap().path();
    assert_eq!(entries(&aside).0.commits(), before.commits());
    let replayed = atoll(&["replay", &aside.to_string_lossy()]);
    assert!(text(&replayed.stdout).contains("all digests equal"), "{}", text(&replayed.stderr));

    // The site that has trained on all the while takes the older model and goes on.
    let mut coordinator = lab.coordinate();
    let report = lab.wait_for("the run to go on", |report| {
        report.state == "training" && report.commits >= 9 + 8 && report.sites[0].state == "training"
    });
    assert_eq!(report.sites[0].digest_mismatches, 0, "{}", lab.log("a"));
    lab.stop(&mut coordinator);
    let (book, _) = entries(&lab.run());
    assert!(book.commits() >= 17);
    let replayed = lab.replay();
    assert!(replayed.contains(&format!("{} tokens in the model, each once", book.tokens)), "{replayed}");
}

/// Flips a bit of a snapshot's weights.
fn damage(snapshot: &Path) {
    let weights = snapshot.join("model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::remove_file(&weights).unwrap(); // Another name may lead to the same file.
    std::fs::write(&weights, bytes).unwrap();
}

#[test]
fn a_damaged_snapshot_is_passed_over() {
    let lab = Lab::new(LONG, &[]);
    let mut coordinator = lab.coordinate();
    let _a = lab.join("a", &lab.ticket("a"), &[]);
    let dir = RunDir(lab.run());
    let report = lab.wait_for("snapshots", |_| snapshot::list(&dir).len() >= 3);
    lab.wait_for("commits behind them", |later| later.commits >= report.commits + 8);
    lab.stop(&mut coordinator);

    let (_, second) = &snapshot::list(&dir)[1];
    let to = snapshot::place(second).unwrap().book.commits() + 1;
    damage(second);
    let rolled = roll_back(&lab, to);
    let said = text(&rolled.stderr);
    assert!(rolled.status.success() && said.contains("is damaged, so another has to do"), "{said}");
    assert_eq!(entries(&lab.run()).0.commits(), to);

    damage(&snapshot::list(&dir)[0].1);
    let replayed = atoll(&["replay", &lab.path("run")]);
    let (said, found) = (text(&replayed.stderr), text(&replayed.stdout));
    assert!(replayed.status.success() && said.contains("is damaged, so another has to do"), "{said}");
    assert!(
        found.contains("all digests equal") && found.contains("summed up by the oldest undamaged snapshot"),
        "{found}"
    );
}

#[test]
fn what_is_not_kept_cannot_be_reached() {
    let lab = Lab::new(LONG, &[("keep = \"all\"", "keep = \"snapshots\""), ("snapshots = 2", "snapshots = 1")]);
    let mut coordinator = lab.coordinate();
    let _a = lab.join("a", &lab.ticket("a"), &[]);
    lab.wait_for("commits", |report| report.commits >= 8);
    lab.stop(&mut coordinator);
    let refused = roll_back(&lab, 0);
    let error = text(&refused.stderr);
    assert!(!refused.status.success() && error.contains("commit 0 of") && error.contains("keep = \"all\""), "{error}");
    assert!(!lab.run().join("set-aside").exists() && !lab.run().join(".rollback").exists());
    lab.replay();
}
