//! What a site that starts does with what earlier processes of it have left on disk.

use super::*;

/// Weights of the only fragment: 4 kB.
const WEIGHTS: usize = 1000;

fn site() -> Site {
    let mut site = Site::new(SiteSettings {
        fragment_lens: vec![WEIGHTS],
        dataset: DatasetId(Digest::of(b"data")),
        samples: 1000,
        samples_per_step: 2,
        session: 5,
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
    }
}

fn hear(site: &mut Site, standing: Standing) -> Vec<SiteOrder> {
    site.handle(Time(1), SiteEvent::Standing(Box::new(standing)))
}

#[test]
fn a_process_takes_up_once_what_earlier_ones_have_left_and_before_it_begins() {
    let mut site = site();
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
