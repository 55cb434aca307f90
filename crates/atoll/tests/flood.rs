//! Strangers by the thousand before a real coordinator: what they cost it, and that the run goes on and new sites get in.

#![allow(clippy::unwrap_used, reason = "a test may panic")]
#![cfg(target_os = "linux")] // It reads what processes use from /proc.

mod common;

use std::fs;
use std::io::Write;
use std::net::TcpStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use atoll_core::wire::{BODY_MAX, Frame, HEADER, Purpose};
use atoll_node::identity::{Identity, Ticket};
use atoll_node::link::{Dialer, Link};
use common::{Lab, Process, greet};
use tokio::io::AsyncWriteExt;

const MIB: u64 = 1 << 20;

/// Bytes of memory that a process has, and the files that it has open.
fn used(process: &Process) -> (u64, usize) {
    let proc = PathBuf::from(format!("/proc/{}", process.0.id()));
    let status = fs::read_to_string(proc.join("status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().unwrap();
    (kib << 10, fs::read_dir(proc.join("fd")).unwrap().count())
}

/// Connections that begin something and never end it.
fn flood(lab: &Lab, dialer: &Dialer, runtime: &tokio::runtime::Runtime, is_over: &AtomicBool, opened: &AtomicU64) {
    let (address, mut silent, mut slow) = (lab.listen(), Vec::new(), Vec::new());
    // The start of a TLS record that promises 16 KiB, of which a byte comes now and then.
    let record = [22, 3, 1, 0x40, 0];
    while !is_over.load(Ordering::Relaxed) {
        // Half-open: nothing is ever said.
        silent.extend((0..40).filter_map(|_| TcpStream::connect(&address).ok()));
        slow.extend((0..20).filter_map(|_| TcpStream::connect(&address).ok()));
        slow.iter_mut().for_each(|link: &mut TcpStream| drop(link.write_all(&record)));
        // With a key that nobody knows: silent, with a greeting that is too long, and with nonsense for ever.
        let greetings = runtime.block_on(async {
            let mut links = Vec::new();
            for _ in 0..10 {
                links.extend(dialer.dial(&address).await.ok());
            }
            for link in links.iter_mut().skip(3) {
                let mut header = (BODY_MAX as u32).to_le_bytes().to_vec();
                header.push(1);
                assert_eq!(header.len(), HEADER);
                let _ = link.write_all(&header).await;
                let _ = link.write_all(&[0xA5; 32 << 10]).await;
            }
            links.len() as u64
        });
        opened.fetch_add(60 + greetings, Ordering::Relaxed);
        silent.drain(..silent.len().saturating_sub(400));
        slow.drain(..slow.len().saturating_sub(200));
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn strangers_by_the_thousand_cost_little_and_stop_nothing() {
    let lab = Lab::new(100_000_000, &[]);
    let coordinator = lab.coordinate();
    let _first = lab.join("a", &lab.ticket("a"), &["--share", "0.3"]);
    lab.wait_for("commits", |report| report.commits > 4);
    let (memory, _) = used(&coordinator);

    let ticket = Ticket::from_text(&lab.ticket("stranger")).unwrap();
    let identity = Identity::load_or_create(&PathBuf::from(lab.path("stranger.key"))).unwrap();
    let dialer = Dialer::new(&identity, ticket.coordinator).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (is_over, opened) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| flood(&lab, &dialer, &runtime, &is_over, &opened));
        let ends = End(&is_over);
        let before = lab.status().unwrap().commits;
        lab.wait_for("the flood", |_| opened.load(Ordering::Relaxed) > 2_000);
        let late = lab.join("late", &lab.ticket("late"), &["--share", "0.3"]);
        lab.wait_for("a new site's work", |report| {
            report.commits > before + 8 && report.sites.iter().any(|site| site.name == "late" && site.contributions > 1)
        });
        let (flooded, files) = used(&coordinator);
        let opened = opened.load(Ordering::Relaxed);
        println!("{opened} connections of strangers: {} KiB more, {files} files", flooded.saturating_sub(memory) >> 10);
        assert!(flooded < memory + 16 * MIB, "{memory} bytes became {flooded}");
        assert!(files < 500, "{files} files are open");
        drop((ends, late));
    });
}

/// The flood ends also when the test fails.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

async fn enter(dialer: &Dialer, lab: &Lab, secret: [u8; 32], purpose: Purpose) -> Result<Link, String> {
    match greet(dialer, &lab.listen(), Some(secret), purpose).await {
        (link, Some(Frame::Welcome(_))) => Ok(link),
        (_, Some(Frame::Refused(why))) => Err(why),
        (_, other) => panic!("{other:?}"),
    }
}

#[test]
fn a_member_that_takes_nothing_and_wants_everything_is_bounded() {
    let lab = Lab::new(100_000_000, &[]);
    let coordinator = lab.coordinate();
    let _first = lab.join("a", &lab.ticket("a"), &["--share", "0.3"]);
    lab.wait_for("commits", |report| report.commits > 4); // Until then its own rounds make it grow.
    let ticket = Ticket::from_text(&lab.ticket("greedy")).unwrap();
    let identity = Identity::load_or_create(&PathBuf::from(lab.path("greedy.key"))).unwrap();
    let dialer = Dialer::new(&identity, ticket.coordinator).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let _control = enter(&dialer, &lab, ticket.secret.0, Purpose::Control).await.unwrap();
        let mut links = Vec::new();
        let why = loop {
            match enter(&dialer, &lab, ticket.secret.0, Purpose::Data).await {
                Ok(link) => links.push(link),
                Err(why) => break why,
            }
        };
        assert!(why.contains("has 64 connections already") && links.len() == 63, "{why}: {}", links.len());
        // A site that asks and asks, and never reads what it is told: most answers stay in the kernel's buffers, the
        // rest in a queue, which has at most 10 MiB, and half of that once more while it grows.
        let (memory, _) = used(&coordinator);
        let ask = Frame::Get { digest: ticket.coordinator, offset: 0, length: 1 }.encode().repeat(1000);
        let mut sent = 0;
        for link in &mut links {
            while sent < 1_000_000 {
                match tokio::time::timeout(Duration::from_millis(500), link.write_all(&ask)).await {
                    Ok(Ok(())) => sent += 1000,
                    _ => break, // Cut off, or nobody reads any more.
                }
            }
        }
        let (greedy, _) = used(&coordinator);
        println!("{sent} questions, {} KiB more", greedy.saturating_sub(memory) >> 10);
        assert!(greedy < memory + 32 * MIB, "{memory} bytes became {greedy}");
    });
    let before = lab.status().unwrap().commits;
    lab.wait_for("the run to go on", |report| report.commits > before + 4);
}
