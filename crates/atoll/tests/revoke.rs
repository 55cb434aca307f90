//! Nobody in who does not belong: keys are revoked while a run lives and while it is stopped, and tickets are good once
//! and for a time.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::time::Duration;

use atoll_core::journal::{Book, Entry};
use atoll_core::site::SiteId;
use common::{Lab, atoll, entries, text, wait};

const LONG: u64 = 100_000_000;

fn revoke(lab: &Lab, site: &str) -> String {
    let revoked = atoll(&["revoke", &lab.path("run"), site]);
    assert!(revoked.status.success(), "{}", text(&revoked.stderr));
    text(&revoked.stdout)
}

/// Joining ends with these words.
fn is_refused(lab: &Lab, ticket: &str, dir: &str, words: &str) {
    let (data, dir) = (lab.path("text"), lab.path(dir));
    let joined = atoll(&["join", ticket, "--data", &data, "--dir", &dir, "--threads", "1"]);
    let error = text(&joined.stderr);
    assert!(!joined.status.success() && error.contains(words) && error.contains("hint:"), "{error}");
}

/// Behind the revocation the site gets nothing, and at most what was being merged of it becomes a commit.
fn nothing_comes_after(lab: &Lab, site: &SiteId) {
    let (mut book, mut is_revoked, mut is_returned) = (Book::default(), false, false);
    for entry in entries(&lab.run()) {
        book.apply(&entry).unwrap();
        assert_eq!(book.ledger.verify(), Ok(()));
        match &entry {
            Entry::Revoked { site: other, .. } if other == site => is_revoked = true,
            Entry::Returned { site: other, .. } if other == site && is_revoked => is_returned = true,
            Entry::Leased { site: other, .. } | Entry::Joined { site: other, .. } if other == site => {
                assert!(!is_revoked, "{entry:?} after the revocation");
            }
            Entry::Committed(commit) if commit.contributions.iter().any(|accepted| accepted.site == *site) => {
                assert!(!is_returned, "a contribution after the revocation");
            }
            _ => {}
        }
    }
    assert!(is_revoked && is_returned && book.held(site).is_empty(), "its samples are back in the pool");
}

#[test]
fn a_revoked_site_is_out_at_once_and_the_run_goes_on() {
    let lab = Lab::new(LONG, &[]);
    let mut coordinator = lab.coordinate();
    let tickets = ["a", "b"].map(|name| lab.ticket(name));
    let _a = lab.join("a", &tickets[0], &["--share", "0.4"]);
    let mut b = lab.join("b", &tickets[1], &["--share", "0.4"]);
    let unused = lab.ticket("b");
    lab.wait_for("both to contribute", |report| {
        report.sites.len() == 2 && report.sites.iter().all(|site| site.contributions > 2)
    });
    assert!(revoke(&lab, "b").contains("is revoked"));
    assert!(!wait(&mut b).success(), "a site that is not wanted does not end well");
    assert!(lab.log("b").contains("the key of b was revoked by the run's operator"), "{}", lab.log("b"));
    let seen = lab.wait_for("the operator to see it", |report| report.sites[1].state == "revoked");
    lab.wait_for("the run to go on", |report| report.commits >= seen.commits + 6);

    is_refused(&lab, &tickets[1], "b", "was revoked");
    is_refused(&lab, &unused, "c", "not one of this run's, or was withdrawn");
    assert!(revoke(&lab, "b").contains("revoked before"));
    nothing_comes_after(&lab, &"b".parse().unwrap());

    // With a new ticket the old key stays out, and a new one comes in under the old name.
    let ticket = lab.ticket("b");
    is_refused(&lab, &ticket, "b", "was revoked");
    let (data, dir) = (lab.path("text"), lab.path("new-b"));
    let _new = lab.spawn("b", &["join", &ticket, "--data", &data, "--dir", &dir, "--threads", "1"]);
    lab.wait_for("the new key to train", |report| report.sites[1].state == "training");
    lab.stop(&mut coordinator);
    lab.replay();
}

#[test]
fn a_stopped_run_revokes_when_it_starts() {
    let lab = Lab::new(LONG, &[]);
    let mut coordinator = lab.coordinate();
    let ticket = lab.ticket("a");
    let mut a = lab.join("a", &ticket, &[]);
    lab.wait_for("a commit", |report| report.commits > 0);
    lab.stop(&mut coordinator);
    assert!(revoke(&lab, "a").contains("no coordinator is running"));
    let _coordinator = lab.coordinate();
    assert!(!wait(&mut a).success() && lab.log("a").contains("was revoked"), "{}", lab.log("a"));
    is_refused(&lab, &ticket, "a", "was revoked");
    nothing_comes_after(&lab, &"a".parse().unwrap());
}

#[test]
fn a_ticket_is_good_once_and_for_a_time() {
    let lab = Lab::new(LONG, &[]);
    let _coordinator = lab.coordinate();
    let ticket = |site: &str, expires: &str| {
        let printed = atoll(&["ticket", &lab.path("run"), site, "--address", &lab.listen(), "--expires", expires]);
        assert!(printed.status.success(), "{}", text(&printed.stderr));
        text(&printed.stdout).trim().to_string()
    };
    let (short, long) = (ticket("a", "1s"), ticket("b", "1h"));
    let mut b = lab.join("b", &long, &[]);
    lab.wait_for("b to be there", |report| report.sites.len() == 1);
    std::thread::sleep(Duration::from_millis(1100));
    is_refused(&lab, &short, "a", "the ticket of a has expired");
    is_refused(&lab, &long, "thief", "already used by another key");
    b.0.kill().unwrap();

    let nobody = atoll(&["revoke", &lab.path("run"), "nobody"]);
    assert!(!nobody.status.success() && text(&nobody.stderr).contains("knows no site nobody"));
    let withdrawn = ticket("c", "never");
    assert!(revoke(&lab, "c").contains("never joined"));
    is_refused(&lab, &withdrawn, "c", "was withdrawn");
}
