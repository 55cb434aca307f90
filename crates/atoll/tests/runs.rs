//! Whole runs with real processes: the promises of the README.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use atoll_node::report::SiteReport;
use common::{LARGER, Lab, atoll, signal, text, wait};

#[test]
fn sites_of_different_shape_hold_the_same_model() {
    let lab = Lab::new(240_000, &[]);
    let mut coordinator = lab.coordinate();
    let shapes: [(&str, &[&str]); 3] = [
        ("a", &["--rows", "2"]),
        ("b", &["--threads", "2", "--share", "0.5"]),
        ("c", &["--rows", "8", "--streams", "1"]),
    ];
    let mut sites: Vec<_> = shapes.iter().map(|(name, more)| lab.join(name, &lab.ticket(name), more)).collect();
    let report = lab.finish(&mut coordinator);
    for (site, (name, _)) in sites.iter_mut().zip(shapes) {
        assert!(wait(site).success(), "{}", lab.log(name));
    }
    assert!(report.tokens >= 240_000 && report.commits > 0, "{report:?}");
    assert_eq!(report.sites.iter().map(|site| site.tokens).sum::<u64>(), report.tokens);
    for site in &report.sites {
        assert!(site.contributions > 0 && site.tokens > 0, "{} brought nothing: {report:?}", site.name);
        assert_eq!(site.digest_mismatches, 0);
        assert!(site.bytes_sent > 0 && site.bytes_received > 0);
    }
    let (guarded, all) =
        report.sites.iter().fold((0, 0), |sums, site| (sums.0 + site.guarded, sums.1 + site.contributions));
    println!("the guard took something from {guarded} of {all} contributions");
    assert!(guarded * 20 <= all, "honest sites are taken for malicious: {report:?}");
    let (first, last) = (report.bits_per_byte.first.unwrap(), report.bits_per_byte.last.unwrap());
    assert!(last < first, "nothing was learnt: {first} to {last}");
    assert!(lab.replay().contains("all digests equal"));

    // The model can be used, and an export of it is the same model.
    let out = lab.path("export");
    let exported = atoll(&["export", &lab.path("run"), &out]);
    assert!(exported.status.success(), "{}", text(&exported.stderr));
    let speak = |dir: &str| {
        let said = atoll(&["generate", dir, "--prompt", "reef tide", "--tokens", "20", "--seed", "3"]);
        assert!(said.status.success(), "{}", text(&said.stderr));
        text(&said.stdout)
    };
    assert_eq!(speak(&lab.path("run")), speak(&out));
    let evaluated = atoll(&["eval", &out, "--data", &lab.path("text"), "--json"]);
    let figures: serde_json::Value = serde_json::from_slice(&evaluated.stdout).unwrap();
    assert!(figures["bits_per_byte"].as_f64().unwrap() < first);
}

#[test]
fn what_synchronization_costs_is_told_in_the_report_in_events_and_by_status() {
    let is_free = |(line, _): &&(&str, &str)| !line.contains("auto");
    let larger: Vec<_> = LARGER.iter().filter(is_free).copied().collect();
    let lab = Lab::new(100_000_000, &larger);
    let mut coordinator = lab.coordinate();
    let mut sites = ["a", "b"].map(|name| lab.join(name, &lab.ticket(name), &[]));
    // Nobody has said what these links carry.
    let report = lab.wait_for("links to be known and used", |report| {
        let is_used = |site: &SiteReport| site.up_mbit > 0.0 && site.down_mbit > 0.0 && site.contributions > 8;
        let is_rich = |site: &SiteReport| site.pace.matches("of e3m0").count() == 2;
        report.sites.len() == 2
            && report.fragments.iter().any(|fragment| fragment.quorum == 2)
            && report.sites.iter().all(|site| is_used(site) && is_rich(site) && site.exposed_seconds > 0.0)
    });
    for site in &report.sites {
        let measured = [site.hidden_seconds, site.round_seconds, site.round_seconds_expected, site.rtt_seconds];
        assert!(measured.iter().all(|&seconds| seconds > 0.0 && seconds < 100.0), "{site:?}");
        assert!(site.cosine > 0.0 && site.cosine <= 1.0, "{site:?}");
        assert!(site.contribution_bytes > 0 && site.payload_sent > 0 && site.payload_received > 0, "{site:?}");
        assert!((1..=32).contains(&site.steps_per_round) && site.pace.contains("Mbit/s"), "{site:?}");
    }
    for fragment in &report.fragments {
        assert!((1..=2).contains(&fragment.quorum) && fragment.round_seconds > 0.0, "{fragment:?}");
        assert!(
            fragment.effective_step > 0.5 && (0.0..1.0).contains(&fragment.rho) && fragment.bytes > 0,
            "{fragment:?}"
        );
    }

    let status = atoll(&["status", &lab.path("run"), "--rounds"]);
    let said = text(&status.stdout);
    for word in [
        "exposed",
        "hidden",
        "expected",
        "a contribution",
        "staleness",
        "cosine to consensus",
        "ρ",
        "effective step",
        " after ",
    ] {
        assert!(said.contains(word), "status --rounds does not tell of '{word}': {said}");
    }

    // While both are here: of who has left nothing is expected.
    let events = std::fs::read_to_string(lab.run().join("events.jsonl")).unwrap();
    let events = events.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let commits: Vec<_> = events.filter(|event| event["event"] == "commit").collect();
    let of_commit = ["bytes", "round_seconds", "rho", "effective_step", "norm", "residual"];
    let of_site = ["bytes", "exposed_seconds", "hidden_seconds", "round_seconds", "round_seconds_expected", "cosine"];
    let is_told = |value: &serde_json::Value| value.as_f64().is_some_and(|number| number > 0.0);
    let is_whole = |commit: &&serde_json::Value| {
        let sites = commit["sites"].as_array().unwrap();
        let is_known = |site: &serde_json::Value| {
            of_site.iter().all(|name| is_told(&site[name]))
                && site["staleness"].is_u64()
                && ["e3m0", "tcq:1"].contains(&site["codec"].as_str().unwrap())
        };
        commit["codec"] == "e3m0" && of_commit.iter().all(|name| is_told(&commit[name])) && sites.iter().all(is_known)
    };
    assert!(commits.iter().any(|commit| is_whole(&commit)), "{:?}", commits.last());

    sites.iter_mut().for_each(|site| signal(site, "TERM"));
    assert!(sites.iter_mut().all(|site| wait(site).success()));
    lab.stop(&mut coordinator);
}

#[test]
fn any_process_may_be_killed_and_started_again() {
    /// Some seconds of training, so that the run is not done before the last process was killed.
    const GOAL: u64 = 2_500_000;
    let lab = Lab::new(GOAL, &[]);
    let mut coordinator = lab.coordinate();
    let tickets = ["a", "b"].map(|name| lab.ticket(name));
    let start = |name: &str, ticket: &str| lab.join(name, ticket, &["--share", "0.4"]);
    let (mut a, mut b) = (start("a", &tickets[0]), start("b", &tickets[1]));
    let mut commits = lab.wait_for("the first commits", |report| report.commits >= 4).commits;
    for round in 0..3 {
        match round {
            0 => {
                a.0.kill().unwrap();
                a.0.wait().unwrap();
                a = start("a", &tickets[0]);
            }
            1 => {
                coordinator.0.kill().unwrap();
                coordinator.0.wait().unwrap();
                coordinator = lab.coordinate();
            }
            _ => {
                b.0.kill().unwrap();
                b.0.wait().unwrap();
                coordinator.0.kill().unwrap();
                coordinator.0.wait().unwrap();
                coordinator = lab.coordinate();
                b = start("b", &tickets[1]);
            }
        }
        let seen = lab.wait_for("training to go on", |report| {
            report.commits >= commits + 6 && report.sites.iter().all(|site| site.state == "training")
        });
        commits = seen.commits;
    }
    let report = lab.finish(&mut coordinator);
    assert!(wait(&mut a).success() && wait(&mut b).success());
    assert!(report.tokens >= GOAL);
    assert!(report.seconds < 3600.0, "{} seconds of training were counted", report.seconds);
    assert!(report.sites.iter().all(|site| site.digest_mismatches == 0), "{report:?}");
    let replayed = lab.replay();
    assert!(replayed.contains(&format!("{} tokens in the model, each once", report.tokens)), "{replayed}");
}

#[test]
fn what_is_stopped_goes_on() {
    let lab = Lab::new(150_000, &[]);
    let mut coordinator = lab.coordinate();
    let ticket = lab.ticket("a");
    let mut site = lab.join("a", &ticket, &["--share", "0.5"]);
    let before = lab.wait_for("some commits", |report| report.commits >= 8);
    signal(&site, "INT");
    assert!(wait(&mut site).success(), "{}", lab.log("a"));
    lab.stop(&mut coordinator);
    let stopped = lab.status().unwrap();
    assert_eq!(stopped.state, "stopped");
    assert!(stopped.tokens >= before.tokens);

    let mut coordinator = lab.coordinate();
    let after = lab.status().unwrap();
    assert!(after.tokens >= stopped.tokens, "tokens were lost");
    let mut site = lab.join("a", &ticket, &[]);
    let report = lab.finish(&mut coordinator);
    assert!(wait(&mut site).success());
    assert!(report.tokens >= 150_000);
    let log = lab.log("a");
    assert!(log.contains("takes up what an earlier process has not delivered"), "{log}");
    let kept = ["undelivered", "arriving"].map(|name| std::fs::read_dir(format!("{}/{name}", lab.path("a"))));
    assert!(!kept.into_iter().flatten().flatten().any(|_| true), "files stay that nobody will read");
    lab.replay();
    let again = atoll(&["coordinate", &lab.path("run"), "--listen", "127.0.0.1:0"]);
    assert!(!again.status.success() && text(&again.stderr).contains("is finished"), "{}", text(&again.stderr));
}

#[test]
fn a_silent_site_holds_nobody_up() {
    let lab = Lab::new(120_000, &[]);
    let mut coordinator = lab.coordinate();
    let (_a, b) =
        (lab.join("a", &lab.ticket("a"), &["--share", "0.4"]), lab.join("b", &lab.ticket("b"), &["--share", "0.4"]));
    lab.wait_for("both to contribute", |report| {
        report.sites.len() == 2 && report.sites.iter().all(|site| site.contributions > 2)
    });
    signal(&b, "STOP");
    let report = lab.finish(&mut coordinator);
    signal(&b, "CONT");
    assert!(report.tokens >= 120_000);
    lab.replay();
}

#[test]
fn contributions_are_tried_on_held_out_text_and_honest_sites_keep_their_weight() {
    // One fragment, so that a contribution is all that a site has learnt: of a part alone a few steps need not help.
    let changes =
        [("[coordinator]\n", "[coordinator]\ntrial_text = \"../text\"\n"), ("fragments = 4", "fragments = 1")];
    let lab = Lab::new(720_000, &changes);
    let mut coordinator = lab.coordinate();
    let mut sites = ["a", "b"].map(|name| lab.join(name, &lab.ticket(name), &[]));
    let report = lab.finish(&mut coordinator);
    assert!(sites.iter_mut().all(|site| wait(site).success()));
    let events = std::fs::read_to_string(lab.run().join("events.jsonl")).unwrap();
    let events = events.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let tried: Vec<serde_json::Value> = events.filter(|event| event["event"] == "tried").collect();
    assert!(!tried.is_empty(), "nothing was tried: {}", lab.log("coordinator"));
    for event in &tried {
        let before = event["before"].as_f64().unwrap();
        let after: Vec<f64> = event["sites"].as_array().unwrap().iter().map(|s| s["after"].as_f64().unwrap()).collect();
        assert!(before > 0.0 && after.len() == 2 && after.iter().all(|after| *after > 0.0), "{event}");
    }
    // Far from the end of learning whatever is learnt helps.
    let first = &tried[0];
    assert!(
        first["sites"].as_array().unwrap().iter().any(|site| site["after"].as_f64() < first["before"].as_f64()),
        "{first}"
    );
    assert!(report.sites.iter().all(|site| site.guarded_for != "harmful" && site.quality > -0.25), "{report:?}");
    assert!(lab.replay().contains("all digests equal"));
}

#[test]
fn a_text_for_trials_that_is_not_there_is_said_before_anything_begins() {
    let lab = Lab::new(1_000, &[("[coordinator]\n", "[coordinator]\ntrial_text = \"gone\"\n")]);
    for command in ["check", "coordinate"] {
        let refused = atoll(&[command, &lab.path("run")]);
        assert!(!refused.status.success());
        let said = text(&refused.stderr);
        assert!(said.contains("coordinator.trial_text names") && said.contains("hint:"), "{said}");
    }
}
