//! Worlds that must end well. A failing seed goes into `seeds.txt` and stays there.

use atoll_sim::{DiskFailures, Hardships, Outcome, simulate, simulate_thin};

/// What broke in the worlds of the first `count` seeds.
fn broken(count: u64, simulate: fn(u64, Hardships) -> Result<Outcome, String>) -> Vec<String> {
    let half = |first: u64| (first..count).step_by(2).filter_map(move |seed| simulate(seed, Hardships::of(seed)).err());
    std::thread::scope(|scope| {
        let other = scope.spawn(|| half(1).collect::<Vec<_>>());
        let mut broken: Vec<String> = half(0).collect();
        broken.extend(other.join().expect("the other half ends"));
        broken
    })
}

#[test]
fn two_hundred_hostile_worlds_keep_every_invariant() {
    let broken = broken(200, simulate);
    assert!(broken.is_empty(), "{} of 200 worlds broke:\n{}", broken.len(), broken.join("\n"));
}

#[test]
fn sixty_hostile_worlds_with_thin_links_keep_every_invariant() {
    let broken = broken(60, simulate_thin);
    assert!(broken.is_empty(), "{} of 60 worlds broke:\n{}", broken.len(), broken.join("\n"));
}

#[test]
fn seeds_that_once_failed_hold() {
    for line in include_str!("seeds.txt").lines().filter(|line| !line.starts_with('#')) {
        let seed = line.split_whitespace().next().and_then(|seed| seed.parse().ok()).expect("a seed per line");
        let hardships = Hardships::of(seed);
        simulate_thin(seed, hardships).unwrap();
        simulate(seed, Hardships { standby: false, disk_faults: 0, ..hardships }).unwrap();
        simulate(seed, Hardships { standby: true, disk_faults: 0, ..hardships }).unwrap();
        simulate(seed, hardships).unwrap();
    }
}

#[test]
fn a_standby_takes_over_and_the_earlier_leader_is_fenced_off() {
    let epochs = |seed| simulate(seed, Hardships { standby: true, crashes: 8, ..Hardships::of(seed) }).unwrap().epochs;
    let all: Vec<u64> = (0..40).map(epochs).collect();
    let changes: u64 = all.iter().map(|epochs| epochs - 1).sum();
    assert!(all.iter().all(|epochs| *epochs > 0) && changes > 20, "{all:?}");
}

#[test]
fn disks_are_full_cut_writes_short_and_flip_bits() {
    let failures = |seed, standby| {
        let hardships = Hardships { disk_faults: 40, crashes: 8, standby, ..Hardships::of(seed) };
        simulate(seed, hardships).unwrap().disk_failures
    };
    let all: Vec<DiskFailures> = (0..60).map(|seed| failures(seed, seed % 2 == 0)).collect();
    let kinds: [fn(&DiskFailures) -> u64; 4] = [|all| all.full, |all| all.torn, |all| all.flipped, |all| all.sites];
    for kind in kinds {
        assert!(all.iter().map(kind).sum::<u64>() > 15, "{all:?}"); // What becomes of it is the witness's to see.
    }
}

#[test]
fn what_a_process_has_not_delivered_is_taken_up_by_the_next() {
    let recalled = |seed| -> u64 {
        let outcome = simulate(seed, Hardships::of(seed)).unwrap();
        outcome.sites.iter().map(|site| site.recalled).sum()
    };
    let times: u64 = (0..40).map(recalled).sum();
    assert!(times > 20, "{times} times in 40 worlds"); // That nothing is taken up twice is the witness's to see.
}

#[test]
fn the_same_seed_gives_the_same_world() {
    for seed in [3, 14, 159] {
        assert_eq!(simulate(seed, Hardships::of(seed)), simulate(seed, Hardships::of(seed)));
    }
}

#[test]
fn a_calm_world_learns_the_target() {
    for seed in 0..20 {
        let outcome = simulate(seed, Hardships::NONE).unwrap();
        // Some of these worlds throw steps away or send a fifth of their few weights at a time.
        assert!(outcome.error < 0.2, "seed {seed}: {}", outcome.error);
    }
}
