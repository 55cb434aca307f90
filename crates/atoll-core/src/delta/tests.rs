//! Stories of a site's weights: whatever happens to contributions and processes, what is owed is what was learnt,
//! contributed and not delivered.

use super::*;
use crate::model::{Tensor, TensorKind};
use crate::rng::Rng;
use crate::team::Alone;
use proptest::prelude::*;

const COUNT: usize = 40;
const FRAGMENT: FragmentId = FragmentId(0);
const LAYOUT: Digest = Digest([1; 32]);

/// What happens next.
#[derive(Debug, Clone, Copy)]
enum Turn {
    Step,
    Contribute,
    /// The contribution that is under way enters the model; is what is owed written down now?
    Merge(bool),
    Refuse,
    /// A commit that holds only others' work.
    Follow,
    /// All weights are fetched anew.
    Install,
    /// The process stops in an orderly way, and another starts; had the contribution under way been merged?
    Stop(bool),
    /// The process is killed; had the contribution been merged, and how much of the file has the disk lost?
    Crash(bool, usize),
}

fn turns() -> impl Strategy<Value = Vec<Turn>> {
    let turn = prop_oneof![
        4 => Just(Turn::Step),
        4 => Just(Turn::Contribute),
        4 => any::<bool>().prop_map(Turn::Merge),
        1 => Just(Turn::Refuse),
        1 => Just(Turn::Follow),
        1 => Just(Turn::Install),
        1 => any::<bool>().prop_map(Turn::Stop),
        2 => (any::<bool>(), prop_oneof![2 => Just(0), 1 => 0usize..800]).prop_map(|(m, lost)| Turn::Crash(m, lost)),
    ];
    prop::collection::vec(turn, 0..60)
}

/// A site with one fragment, and what somebody knows who has watched it from the beginning.
struct Story {
    local: Local,
    follow: Follow,
    feedback: Feedback,
    codec: Codec,
    /// θ.
    weights: Vec<f32>,
    /// Pseudo-gradient of the steps that are in no contribution.
    steps: Vec<f32>,
    /// The same of those in the contribution that is under way, and its payload.
    under_way: Option<(Vec<f32>, Vec<u8>)>,
    /// What was learnt and is for the model, delivered or not, and what of it was delivered.
    learnt: Vec<f32>,
    received: Vec<f32>,
    delivered: Digest,
    file: Vec<u8>,
    /// The residuals that the file tells of, and whether a contribution that was merged since has spoken of a weight.
    left: Vec<Vec<f32>>,
    spoken: Vec<bool>,
    chance: Rng,
}

impl Story {
    fn new(follow: Follow, feedback: Feedback, codec: Codec, seed: u64) -> Self {
        let zeros = || vec![0.0; COUNT];
        let mut story = Self {
            local: local(follow, feedback),
            follow,
            feedback,
            codec,
            weights: zeros(),
            steps: zeros(),
            under_way: None,
            learnt: zeros(),
            received: zeros(),
            delivered: Digest::default(),
            file: Vec::new(),
            left: Vec::new(),
            spoken: vec![false; COUNT],
            chance: Rng::new(seed),
        };
        story.install();
        story
    }

    fn some(&mut self) -> Vec<f32> {
        (0..COUNT).map(|_| self.chance.normal() as f32).collect()
    }

    fn change(&mut self, change: Change) {
        match change {
            Change::Write(weights) => self.weights = weights,
            Change::Add(change) => add(&mut self.weights, &change),
        }
    }

    fn install(&mut self) {
        let theta = self.some();
        let (_, change) = self.local.install(FRAGMENT, theta.clone()).unwrap();
        self.change(change);
        self.steps = vec![0.0; COUNT];
    }

    fn follow(&mut self) {
        let codec = [Codec::F32, Codec::Sparse(1024), Codec::Tcq(2)][self.chance.below(3) as usize];
        let delta = codec.encode(&self.some()).unwrap();
        let (_, change) = self.local.commit(FRAGMENT, delta, &Alone).unwrap();
        if change.overwrites() {
            self.steps = vec![0.0; COUNT];
        }
        self.change(change);
    }

    fn turn(&mut self, turn: Turn) {
        match turn {
            Turn::Step => {
                let step = self.some();
                add(&mut self.weights, &step);
                self.steps.iter_mut().zip(&step).for_each(|(steps, step)| *steps -= step);
            }
            Turn::Contribute => self.contribute(),
            Turn::Merge(writes) => {
                if self.settle(true) {
                    self.local.delivered(FRAGMENT);
                    if writes {
                        self.write(1);
                    }
                    self.follow();
                }
            }
            Turn::Refuse => {
                if self.settle(false) {
                    let change = self.local.rebase(FRAGMENT);
                    self.change(change);
                }
            }
            Turn::Follow => self.follow(),
            Turn::Install => self.install(),
            Turn::Stop(merged) => {
                self.write(2);
                self.settle(merged);
                self.start();
            }
            Turn::Crash(merged, lost) => {
                self.settle(merged);
                self.file.truncate(self.file.len().saturating_sub(lost));
                let spoken = self.spoken.clone();
                self.start();
                let owed = self.owed();
                assert!((0..COUNT).all(|place| owed[place] == 0.0 || !spoken[place]), "it is delivered twice");
                // The loss is accepted.
                self.learnt.iter_mut().zip(&self.received).zip(owed).for_each(|((l, r), owed)| *l = r + owed);
            }
        }
    }

    fn contribute(&mut self) {
        if self.under_way.is_none() {
            let payload = self.local.contribute(FRAGMENT, self.weights.clone(), self.codec, &Alone).unwrap();
            self.file.extend(residual::sent(&payload.bytes));
            self.under_way = Some((mem::replace(&mut self.steps, vec![0.0; COUNT]), payload.bytes));
        }
    }

    /// Decides on the contribution that is under way, if there is one.
    fn settle(&mut self, merged: bool) -> bool {
        let Some((steps, payload)) = self.under_way.take() else { return false };
        if merged {
            add(&mut self.learnt, &steps);
            let sound = codec::Payload::parse(&payload, COUNT).unwrap();
            sound.add_to(&mut self.received, &Alone);
            sound.visit(0..COUNT, |place, _| self.spoken[place] = true);
            self.delivered = Digest::of(&payload);
        }
        true
    }

    /// Writes down at most so many residuals.
    fn write(&mut self, most: usize) {
        let residuals: Vec<&Residual> = self.local.residuals(FRAGMENT).take(most).collect();
        let parts = residuals.iter().map(|residual| residual::left(residual));
        self.file = [residual::file(LAYOUT)].into_iter().chain(parts).flatten().collect();
        self.left = residuals.iter().map(|residual| residual.values.clone()).collect();
        self.spoken = vec![false; COUNT];
    }

    /// Another process takes the place of this one.
    fn start(&mut self) {
        self.local = local(self.follow, self.feedback);
        if let Some(residual) = residual::recall(&self.file, LAYOUT, COUNT, self.delivered) {
            self.local.recall(FRAGMENT, residual);
        }
        let owed = self.owed();
        let is_known = |place: usize| owed[place] == 0.0 || self.left.iter().any(|left| left[place] == owed[place]);
        assert!((0..COUNT).all(is_known), "a weight's residual is one that was written down, or nothing");
        self.write(1);
        self.install();
    }

    fn owed(&self) -> Vec<f32> {
        let owed = self.local.fragments[0].owed.as_ref();
        owed.map_or_else(|| vec![0.0; COUNT], |owed| owed.values.clone())
    }

    /// Everything adds up.
    fn check(&self) -> Result<(), TestCaseError> {
        let Copies { theta, reference, .. } = &self.local.fragments[0];
        let from = reference.as_ref().unwrap_or(theta);
        let kept = self.local.fragments[0].residual().filter(|_| self.feedback == Feedback::Weights);
        let owed = self.owed();
        for place in 0..COUNT {
            let wish = from[place] - self.weights[place];
            let expected = self.steps[place] + kept.map_or(0.0, |kept| kept[place]);
            prop_assert!((wish - expected).abs() < 1e-3, "the weights hold {wish}, expected {expected}");
            let left = self.learnt[place] - self.received[place];
            prop_assert!((owed[place] - left).abs() < 1e-3, "{} is owed, expected {left}", owed[place]);
        }
        Ok(())
    }
}

fn local(follow: Follow, feedback: Feedback) -> Local {
    let manifest = Manifest::balanced(vec![Tensor::new("a", &[COUNT], TensorKind::Vector)], 1);
    Local::new(&manifest, follow, feedback)
}

proptest! {
    #[test]
    fn all_that_was_learnt_is_delivered_or_owed_over_restarts(
        turns in turns(),
        follow in prop_oneof![Just(Follow::Carry), Just(Follow::Overwrite)],
        feedback in prop_oneof![Just(Feedback::Weights), Just(Feedback::Buffer)],
        codec in prop::sample::select(vec!["sparse:300", "sparse:2000", "e3m0"]),
        seed: u64,
    ) {
        let mut story = Story::new(follow, feedback, codec.parse().unwrap(), seed);
        for turn in turns {
            story.turn(turn);
            story.check()?;
        }
    }
}

#[test]
fn what_a_stopped_process_owed_is_in_the_first_contribution_of_the_next() {
    for feedback in [Feedback::Weights, Feedback::Buffer] {
        let mut story = Story::new(Follow::Carry, feedback, Codec::Sparse(300), 1);
        [Turn::Step, Turn::Contribute, Turn::Merge(false), Turn::Stop(false)]
            .into_iter()
            .for_each(|turn| story.turn(turn));
        let owed = story.owed();
        assert!(norm(&owed) > 1.0);
        story.codec = Codec::F32;
        story.turn(Turn::Contribute);
        let payload = &story.under_way.as_ref().unwrap().1;
        let sent = codec::decode(payload, COUNT).unwrap();
        assert!(sent.iter().zip(owed).all(|(sent, owed)| (sent - owed).abs() < 1e-5), "{feedback:?}");
    }
}

#[test]
fn what_is_handed_in_stays_in_the_weights_until_a_commit_tells_of_it() {
    let mut local = local(Follow::Carry, Feedback::Weights);
    local.install(FRAGMENT, vec![0.0; COUNT]).unwrap();
    let mut chance = Rng::new(5);
    let mut weights: Vec<f32> = (0..COUNT).map(|_| chance.normal() as f32).collect();
    let sent = local.contribute(FRAGMENT, weights.clone(), Codec::F32, &Alone).unwrap();
    // The coordinator has all of it, and tells the greatest quarter.
    let mut merged: Vec<f32> = codec::decode(&sent.bytes, COUNT).unwrap().iter().map(|wish| -wish).collect();
    let told = Codec::Sparse(1024).encode_rest(&mut merged, &Alone).unwrap();
    let (_, change) = local.commit(FRAGMENT, told.clone(), &Alone).unwrap();
    let Change::Add(change) = change else { panic!("it carries") };
    let told = codec::decode(&told, COUNT).unwrap();
    assert_eq!(told.iter().filter(|told| **told != 0.0).count(), COUNT / 4);
    for ((change, told), own) in change.iter().zip(&told).zip(&weights) {
        assert_eq!(*change, if *told == 0.0 { 0.0 } else { told - own });
    }
    add(&mut weights, &change);
    // Nothing was learnt since, so there is nothing to hand in again.
    let again = local.contribute(FRAGMENT, weights.clone(), Codec::F32, &Alone).unwrap();
    assert!(again.norm < 1e-6, "{}", again.norm);
    // Once all is told, the site is where the model is.
    let rest = Codec::F32.encode(&merged).unwrap();
    let (_, change) = local.commit(FRAGMENT, rest, &Alone).unwrap();
    let Change::Add(change) = change else { panic!("it carries") };
    add(&mut weights, &change);
    assert!(weights.iter().zip(local.theta(FRAGMENT)).all(|(own, theta)| (own - theta).abs() < 1e-6));
}

/// Whatever becomes of its steps, a share of what it has handed in is in its weights and in the reference.
#[test]
fn a_share_of_what_is_handed_in_stays_where_a_commit_tells_a_part_of_everything() {
    const LEFT: f32 = 0.753 * 0.753;
    let all = [Follow::Carry, Follow::Overwrite]
        .map(|follow| [(follow, Codec::F32, LEFT), (follow, Codec::Tcq(1), 0.5 * LEFT)]);
    for (follow, up, share) in all.concat() {
        let mut local = local(follow, Feedback::Weights);
        local.install(FRAGMENT, vec![0.0; COUNT]).unwrap();
        let mut chance = Rng::new(5);
        let mut weights: Vec<f32> = (0..COUNT).map(|_| chance.normal() as f32).collect();
        let sent = local.contribute(FRAGMENT, weights.clone(), up, &Alone).unwrap();
        let sent = codec::decode(&sent.bytes, COUNT).unwrap();
        let rest: Vec<f32> = weights.iter().zip(&sent).map(|(weight, sent)| weight + sent).collect();
        let told = Codec::Tcq(2).encode(&[1.0; COUNT]).unwrap();
        match local.commit(FRAGMENT, told, &Alone).unwrap().1 {
            Change::Add(change) => add(&mut weights, &change),
            Change::Write(written) => weights = written,
        }
        for place in 0..COUNT {
            let expected = local.theta(FRAGMENT)[place] - share * sent[place] + rest[place];
            assert!((weights[place] - expected).abs() < 1e-5, "{follow:?}, {up}: {} is not {expected}", weights[place]);
        }
        let again = local.contribute(FRAGMENT, weights, Codec::F32, &Alone).unwrap();
        assert!((again.norm - norm(&rest)).abs() < 1e-4, "{follow:?}, {up}: only what was not sent is handed in");
    }
}

/// A site that learns most of what there is in every round, and hears less than half of it in each commit. If it lost what it has
/// handed in and not heard yet, it would learn that again and hand it in twice, until the model blows up. A path of its own it would
/// hear nearly all of.
#[test]
fn who_hears_a_part_of_its_own_work_does_not_learn_the_rest_again() {
    const MANY: usize = 2 * codec::CHUNK + 500;
    const LEARNT: f32 = 0.7;
    let manifest = Manifest::balanced(vec![Tensor::new("a", &[MANY], TensorKind::Vector)], 1);
    // Where few rows of 128 weights have anything to learn, payloads speak of few.
    let stories = [Codec::F32, Codec::E3m0, Codec::Tcq(1)].map(|up| [(up, 32), (up, 3)]);
    for (up, rows) in stories.concat() {
        let mut local = Local::new(&manifest, Follow::Carry, Feedback::Weights);
        local.install(FRAGMENT, vec![0.0; MANY]).unwrap();
        let mut chance = Rng::new(5);
        let scale = |at: usize| if at / 128 % 32 < rows { 1.0 } else { 0.01 };
        let all: Vec<f32> = (0..MANY).map(|at| (scale(at) * chance.normal()) as f32).collect();
        let (mut weights, mut owed) = (vec![0.0; MANY], vec![0.0; MANY]);
        for _ in 0..100 {
            weights.iter_mut().zip(&all).for_each(|(weight, all)| *weight += LEARNT * (all - *weight));
            let handed_in = local.contribute(FRAGMENT, weights.clone(), up, &Alone).unwrap();
            codec::Payload::parse(&handed_in.bytes, MANY).unwrap().add_scaled(-1.0, &mut owed, &Alone);
            let turn = local.fragments[0].turn;
            let told = Codec::Tcq(2).encode_prepared(&mut owed, turn, &Alone, |_, _| {}).unwrap();
            let (_, change) = local.commit(FRAGMENT, told, &Alone).unwrap();
            let Change::Add(change) = change else { panic!("it carries") };
            add(&mut weights, &change);
        }
        let far: Vec<f32> = local.theta(FRAGMENT).iter().zip(&all).map(|(theta, all)| theta - all).collect();
        assert!(norm(&far) < 0.05 * norm(&all), "{up}, {rows} rows: {} of {}", norm(&far), norm(&all));
    }
}

#[test]
fn who_gives_up_steps_gives_up_nothing_that_was_handed_in() {
    for feedback in [Feedback::Weights, Feedback::Buffer] {
        let mut local = local(Follow::Overwrite, feedback);
        local.install(FRAGMENT, vec![0.0; COUNT]).unwrap();
        let mut chance = Rng::new(5);
        let handed_in: Vec<f32> = (0..COUNT).map(|_| chance.normal() as f32).collect();
        local.contribute(FRAGMENT, handed_in.clone(), Codec::F32, &Alone).unwrap();
        let told = Codec::Sparse(1024).encode(&handed_in).unwrap();
        let (_, change) = local.commit(FRAGMENT, told.clone(), &Alone).unwrap();
        let Change::Write(weights) = change else { panic!("it overwrites") };
        let told = codec::decode(&told, COUNT).unwrap();
        for ((weight, told), own) in weights.iter().zip(&told).zip(&handed_in) {
            assert_eq!(*weight, if *told == 0.0 { *own } else { *told });
        }
        let again = local.contribute(FRAGMENT, weights, Codec::F32, &Alone).unwrap();
        assert!(again.norm < 1e-6, "{feedback:?}: {} is handed in twice", again.norm);
    }
}

#[test]
fn who_has_given_up_steps_keeps_the_next_ones_until_it_has_contributed() {
    let mut local = local(Follow::Overwrite, Feedback::Weights);
    local.install(FRAGMENT, vec![0.0; COUNT]).unwrap();
    let commit = Codec::F32.encode(&[1.0; COUNT]).unwrap();
    for contributed in 0..3 {
        let overwrites = [0, 1, 2].map(|_| local.commit(FRAGMENT, commit.clone(), &Alone).unwrap().1.overwrites());
        assert_eq!(overwrites, [true, false, false], "after {contributed} contributions");
        local.contribute(FRAGMENT, vec![contributed as f32; COUNT], Codec::F32, &Alone).unwrap();
    }
}
