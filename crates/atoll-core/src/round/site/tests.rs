//! What a site that starts does with what earlier processes of it have left on disk, and what one that trains does during a step.

use super::*;

/// Weights of the only fragment: 4 kB.
const WEIGHTS: usize = 1000;

fn site(begun: Option<(u64, Digest)>) -> Site {
    let mut site = Site::new(SiteSettings {
        fragment_lens: vec![WEIGHTS],
        dataset: DatasetId(Digest::of(b"data")),
        samples: 1000,
        samples_per_step: 2,
        session: 5,
        begun: vec![begun],
    });
    site.handle(Time(0), SiteEvent::Connected);
    site
}

fn digest(version: u64) -> Digest {
    Digest::of(&version.to_le_bytes())
}

/// What a coordinator says whose fragment is at `version`, to whom the commits that led there had so many bytes.
fn standing(number: u64, version: u64, bytes: u64) -> Standing {
    let fragment = FragmentId(0);
    Standing {
        number,
        session: 5,
        open: true,
        heard: number,
        phase: Phase::Training,
        progress: 0.0,
        steps: 4,
        up: Codec::F32,
        fragments: vec![(version, digest(version))],
        notices: vec![Notice { fragment, version, delta: Digest::of(b"delta"), bytes, digest: digest(version) }],
        pushed: vec![0],
        settled: Vec::new(),
        wanted: Vec::new(),
        leases: Vec::new(),
        evaluate: None,
        delivered: vec![Some(Digest::of(b"last"))],
        successor: None,
    }
}

fn hear(site: &mut Site, standing: Standing) -> Vec<SiteOrder> {
    site.handle(Time(1), SiteEvent::Standing(Box::new(standing)))
}

/// Version of the weights that the site orders.
fn fetched(orders: &[SiteOrder]) -> Option<u64> {
    orders.iter().find_map(|order| match order {
        SiteOrder::Fetch { weights: Some((_, version)), .. } => Some(*version),
        _ => None,
    })
}

#[test]
fn a_process_takes_up_once_what_earlier_ones_have_left_and_before_it_begins() {
    let mut site = site(None);
    let is_recall = |order: &SiteOrder| matches!(order, SiteOrder::Recall(_));
    let orders = hear(&mut site, standing(1, 3, 10));
    let recall = orders.iter().position(is_recall).unwrap();
    assert_eq!(orders[recall], SiteOrder::Recall(vec![Some(Digest::of(b"last"))]));
    assert!(orders[..recall].iter().all(|order| !matches!(order, SiteOrder::Fetch { .. })));
    assert!(!hear(&mut site, standing(2, 3, 10)).iter().any(is_recall));
    let closed = Standing { open: false, ..standing(3, 3, 10) };
    assert!(!hear(&mut site, closed).iter().any(is_recall));
    let again = Standing { session: 6, ..standing(4, 3, 10) };
    assert!(!hear(&mut site, again).iter().any(is_recall), "it has all that there is to know");
}

#[test]
fn weights_that_were_begun_are_fetched_on_while_the_commits_since_are_a_light_tail() {
    let ordered = |begun: u64, version: u64, bytes: u64| {
        fetched(&hear(&mut site(Some((begun, digest(begun)))), standing(1, version, bytes)))
    };
    assert_eq!(ordered(7, 9, 100), Some(7));
    assert_eq!(ordered(7, 9, 3000), Some(9), "the tail weighs more than half of the weights");
    assert_eq!(ordered(7, 7 + TAIL as u64, 1), Some(7 + TAIL as u64), "the tail may be gone");
    assert_eq!(ordered(9, 7, 100), Some(7), "of a future that was lost");
}

/// A standing answers the last report that was heard; the one before the weights came tells of the newest commit only.
#[test]
fn whoever_has_old_weights_waits_to_be_told_of_the_commits_since() {
    let mut site = site(Some((7, digest(7))));
    assert_eq!(fetched(&hear(&mut site, standing(1, 9, 100))), Some(7));
    site.handle(Time(2), SiteEvent::Fetched(digest(7), true));
    let applied = SiteEvent::Applied { fragment: FragmentId(0), version: 7, digest: digest(7), overwritten: true };
    let orders = site.handle(Time(3), applied);
    let report = orders.iter().find_map(|order| match order {
        SiteOrder::Report(status) => Some(status.number),
        _ => None,
    });
    let heard = report.expect("it says what it has");
    let before = Standing { heard: heard - 1, ..standing(2, 10, 100) };
    assert_eq!(fetched(&hear(&mut site, before)), None);
    let mut told = Standing { heard, ..standing(3, 11, 100) };
    told.notices.insert(0, Notice { version: 8, delta: digest(108), ..told.notices[0].clone() });
    let is_next =
        |order: &SiteOrder| matches!(order, SiteOrder::Fetch { digest: at, weights: None, .. } if *at == digest(108));
    assert!(hear(&mut site, told).iter().any(is_next));
}

#[test]
fn weights_that_cannot_be_had_any_more_are_fetched_as_they_are_now() {
    let mut site = site(Some((7, digest(7))));
    assert_eq!(fetched(&hear(&mut site, standing(1, 9, 100))), Some(7));
    site.handle(Time(2), SiteEvent::Disconnected);
    site.handle(Time(3), SiteEvent::Connected);
    assert_eq!(fetched(&hear(&mut site, standing(1, 10, 100))), Some(7), "a lost connection loses nothing");
    site.handle(Time(4), SiteEvent::Fetched(digest(7), false));
    assert_eq!(fetched(&hear(&mut site, standing(2, 10, 100))), Some(10));
}

#[test]
fn a_site_without_coordinator_can_train_until_it_would_be_given_up() {
    let wants_seconds = |seconds: f64| {
        let mut site = site(None);
        hear(&mut site, standing(1, 3, 10));
        let progress = Progress { steps: 1, tokens: 8, ..Progress::default() };
        let mut wants = 0;
        for step in 0..100 {
            let stepped = SiteEvent::Stepped { progress, trained: Ranges::new(), seconds };
            for order in site.handle(Time(step * 1_000_000), stepped) {
                wants = if let SiteOrder::Report(status) = order { status.wants } else { wants };
            }
        }
        wants as f64 / 2.0 * seconds
    };
    // There may be just half of what it wants: then it has asked for no more.
    assert!(wants_seconds(0.03) / 2.0 >= SECONDS_AWAY);
    assert_eq!(wants_seconds(40.0), 3.0 * 4.0 * 40.0, "three rounds are always in hand");
}

/// A site in the middle of its first step, with samples for more; every step is a round.
fn at_work() -> Site {
    let mut site = site(None);
    hear(&mut site, Standing { steps: 1, leases: vec![(1, Ranges::span(0, 20))], ..standing(1, 3, 10) });
    site.handle(Time(2), SiteEvent::Fetched(digest(3), true));
    let applied = SiteEvent::Applied { fragment: FragmentId(0), version: 3, digest: digest(3), overwritten: true };
    assert!(site.handle(Time(3), applied).contains(&SiteOrder::Train(1)));
    site
}

fn stepped(from: u64) -> SiteEvent {
    let progress = Progress { steps: 1, tokens: 8, ..Progress::default() };
    SiteEvent::Stepped { progress, trained: Ranges::span(from, from + 2), seconds: 1.0 }
}

fn contributes(orders: &[SiteOrder]) -> bool {
    orders.iter().any(|order| matches!(order, SiteOrder::Contribute(..)))
}

fn report(orders: &[SiteOrder]) -> Option<&Status> {
    orders.iter().find_map(|order| if let SiteOrder::Report(status) = order { Some(&**status) } else { None })
}

#[test]
fn what_is_encoded_is_sent_during_the_next_step_and_a_commit_that_is_there_when_it_ends_counts() {
    let mut site = at_work();
    let orders = site.handle(Time(4), stepped(0));
    assert!(contributes(&orders) && orders.contains(&SiteOrder::Train(1)));
    let payload = Digest::of(b"payload");
    let encoded = SiteEvent::Contributed { fragment: FragmentId(0), payload, bytes: 9, norm: 1.0, agreement: 0.0 };
    let orders = site.handle(Time(5), encoded);
    assert!(orders.contains(&SiteOrder::Upload(payload)) && report(&orders).unwrap().outstanding.len() == 1);
    let settled = vec![(1, Settled::Committed(4))];
    let orders = hear(&mut site, Standing { steps: 1, settled, ..standing(2, 4, 10) });
    assert!(orders.contains(&SiteOrder::Delivered(FragmentId(0))));
    let commit = Digest::of(b"delta");
    let orders = site.handle(Time(6), SiteEvent::Fetched(commit, true));
    assert!(orders.iter().any(|order| matches!(order, SiteOrder::Commit(_))), "it is decoded during the step");
    let applied = SiteEvent::Applied { fragment: FragmentId(0), version: 4, digest: digest(4), overwritten: false };
    assert!(contributes(&site.handle_all(Time(7), [stepped(2), applied])), "every step is a round");
}

#[test]
fn a_session_that_ends_during_a_step_ends_with_it() {
    let mut site = at_work();
    let closed = || Standing { open: false, ..standing(2, 3, 10) };
    assert!(!hear(&mut site, closed()).contains(&SiteOrder::DropLeases), "the step uses them");
    assert!(site.handle(Time(4), stepped(0)).contains(&SiteOrder::DropLeases));
    let again = Standing { session: 6, leases: vec![(1, Ranges::span(0, 20))], ..standing(3, 3, 10) };
    let orders = hear(&mut site, again);
    assert!(report(&orders).unwrap().unspent == 20 && site.trained.is_empty());
    // What an earlier connection said of it is said again on the next one.
    let mut site = at_work();
    hear(&mut site, closed());
    site.handle(Time(4), SiteEvent::Disconnected);
    assert!(!site.handle(Time(5), stepped(0)).contains(&SiteOrder::DropLeases));
}

#[test]
fn a_site_in_the_middle_of_a_step_has_work_to_hand_in() {
    let mut site = at_work();
    hear(&mut site, Standing { phase: Phase::Closing, ..standing(2, 3, 10) });
    let orders = site.handle(Time(2_000_000), SiteEvent::Tick);
    assert!(!report(&orders).expect("a long step is no silence").drained);
    assert!(contributes(&site.handle(Time(2_000_001), stepped(0))));
}
