//! Which contributions are taken into a round, and which are turned down. Nothing here believes what a site says of
//! its own work: its samples are those that the ledger says it holds, its tokens must fit them, and what a payload is
//! for and how long it is the coordinator has seen itself. The samples of what is turned down go back to the pool, with
//! a sentence for the site and the operator.

use super::{Coordinator, Order, Seen};
use crate::data::Ranges;
use crate::hash::Digest;
use crate::journal::Entry;
use crate::manifest::FragmentId;
use crate::round::{Receipt, Status};
use crate::site::SiteId;

/// A contribution this many times as long as the longest so far is no training, unless it has as many more steps: while
/// the learning rate still rises, the first one may hold a single tiny step and the next all those of a busy minute.
const NORM_TIMES_MAX: f64 = 100.0;
/// … and neither is one whose weights would move by this much on average, whatever came before.
const MOVE_MAX: f64 = 1e3;
/// Payloads of each fragment that a site may send before the contributions they belong to.
const EARLY: usize = 2;

impl Coordinator {
    /// Takes new receipts into their rounds, or turns them down.
    pub(super) fn register(&mut self, site: &SiteId, status: &Status, orders: &mut Vec<Order>) {
        // One contribution of each fragment is all that a site can have under way.
        for receipt in status.outstanding.iter().take(self.rounds.len()) {
            if self.is_settled(site, receipt.number) || self.is_pending(site, receipt.number) {
                continue;
            }
            match self.objection(site, receipt).or_else(|| self.early_objection(site, receipt.payload)) {
                Some(why) => self.refuse(site, receipt, &why, orders),
                None => {
                    let round = &mut self.rounds[receipt.fragment.index()];
                    round.pending.insert((site.clone(), receipt.number), receipt.clone());
                    self.judge(receipt.payload, orders);
                }
            }
        }
    }

    /// A payload is here.
    pub(super) fn arrive(&mut self, site: &SiteId, payload: Digest, seen: Seen, orders: &mut Vec<Order>) {
        self.arrived.insert(payload, seen);
        self.judge(payload, orders);
        if self.arrived.contains_key(&payload) && !self.is_claimed(payload) {
            self.keep_early(site, payload, None, orders);
        }
    }

    /// What a site has sent under this name is no payload.
    pub(super) fn arrive_useless(&mut self, site: &SiteId, payload: Digest, why: String, orders: &mut Vec<Order>) {
        let found = |owner: &SiteId, receipt: &Receipt| owner == site && receipt.payload == payload;
        let turned_down = (0..self.rounds.len()).filter(|&index| self.turn_down(index, &why, found, orders)).count();
        if turned_down == 0 {
            self.keep_early(site, payload, Some(why), orders);
        }
    }

    /// An outer step could not be computed because of a payload.
    pub(super) fn give_up_merge(&mut self, fragment: FragmentId, payload: Digest, why: &str, orders: &mut Vec<Order>) {
        let Some(round) = self.rounds.get_mut(fragment.index()) else { return };
        round.merging = None;
        self.turn_down(fragment.index(), why, |_, receipt| receipt.payload == payload, orders);
    }

    /// Drops all that a site has under way.
    pub(super) fn drop_pending(&mut self, site: &SiteId, orders: &mut Vec<Order>) {
        let early = self.early.remove(site).into_iter().flatten();
        let mut dropped: Vec<Digest> = early.filter(|(_, why)| why.is_none()).map(|(payload, _)| payload).collect();
        for round in &mut self.rounds {
            round.pending.retain(|(owner, _), receipt| {
                if owner == site {
                    dropped.push(receipt.payload);
                }
                owner != site
            });
        }
        dropped.into_iter().for_each(|payload| self.forget(payload, orders));
    }

    /// Lets go of a payload unless another pending contribution was encoded to the same bytes.
    pub(super) fn forget(&mut self, payload: Digest, orders: &mut Vec<Order>) {
        if !self.is_claimed(payload) {
            self.arrived.remove(&payload);
            orders.push(Order::Forget(payload));
        }
    }

    /// Whether a contribution waits for its round.
    pub(super) fn is_pending(&self, site: &SiteId, number: u64) -> bool {
        self.pending(site).any(|receipt| receipt.number == number)
    }

    fn is_settled(&self, site: &SiteId, number: u64) -> bool {
        self.book.sites.get(site).is_some_and(|member| member.outcome(number).is_some())
    }

    fn is_claimed(&self, payload: Digest) -> bool {
        self.rounds.iter().flat_map(|round| round.pending.values()).any(|receipt| receipt.payload == payload)
    }

    /// Contributions of `site` that wait for their rounds.
    fn pending(&self, site: &SiteId) -> impl Iterator<Item = &Receipt> {
        let all = (site.clone(), 0)..=(site.clone(), u64::MAX);
        self.rounds.iter().flat_map(move |round| round.pending.range(all.clone())).map(|(_, receipt)| receipt)
    }

    // ---- what is wrong with a receipt ----

    /// Why a receipt cannot be right, if it cannot.
    fn objection(&self, site: &SiteId, receipt: &Receipt) -> Option<String> {
        let Receipt { fragment, base, steps, tokens, ref ranges, .. } = *receipt;
        let Some(book) = self.book.fragments.get(fragment.index()) else {
            return Some(format!("there is no {fragment}"));
        };
        if base > book.version {
            return Some(format!("{fragment} has no version {base} yet"));
        }
        if self.pending(site).any(|earlier| earlier.fragment == fragment) {
            return Some(format!("the last contribution to {fragment} is not settled yet"));
        }
        if !receipt.norm.is_finite() {
            return Some("its length is not finite".to_string());
        }
        if steps == 0 || tokens == 0 {
            return Some("it holds no training".to_string());
        }
        let claimed_twice = self.pending(site).any(|earlier| earlier.ranges.intersects(ranges));
        if claimed_twice || !self.book.held(site).contains(ranges) {
            return Some("it speaks of samples that are not leased to this site".to_string());
        }
        let samples = self.samples_behind(site, receipt);
        let most = samples.saturating_mul(self.book.context);
        if tokens > most || steps > samples {
            return Some(format!("it claims {steps} steps on {tokens} tokens, and its {samples} samples have {most}"));
        }
        None
    }

    /// Samples that a contribution can stand for: its own, and those of all that its site has contributed to other
    /// fragments since the last one to this fragment. Sites number their contributions in the order of their training.
    fn samples_behind(&self, site: &SiteId, receipt: &Receipt) -> u64 {
        let Some(member) = self.book.sites.get(site) else { return 0 };
        let settled = member.settled.iter().map(|(number, past)| (*number, past.fragment, past.samples));
        let pending = self.pending(site).map(|earlier| (earlier.number, earlier.fragment, earlier.ranges.len()));
        let mut earlier: Vec<(u64, FragmentId, u64)> =
            settled.chain(pending).filter(|(number, ..)| *number < receipt.number).collect();
        earlier.sort_unstable();
        let last = earlier.iter().rposition(|(_, fragment, _)| *fragment == receipt.fragment);
        let since = last.map_or(&earlier[..], |last| &earlier[last + 1..]);
        let forgotten = if last.is_none() { member.forgotten.unwrap_or(0) } else { 0 };
        let samples = since.iter().map(|(.., samples)| *samples).chain([forgotten, receipt.ranges.len()]);
        samples.fold(0, u64::saturating_add)
    }

    /// Records that a receipt, which waits for no round, is turned down.
    fn refuse(&mut self, site: &SiteId, receipt: &Receipt, why: &str, orders: &mut Vec<Order>) {
        let (held, mut claimed, mut ranges) = (self.book.held(site), Ranges::new(), Ranges::new());
        self.pending(site).for_each(|other| claimed.insert(&other.ranges));
        for (start, end) in receipt.ranges.spans() {
            if held.contains_span(start, end) && !claimed.intersects(&Ranges::span(start, end)) {
                ranges.insert_span(start, end);
            }
        }
        let (number, fragment, why) = (receipt.number, receipt.fragment, why.to_string());
        self.record(Entry::Refused { site: site.clone(), number, fragment, ranges, why }, orders);
        self.forget(receipt.payload, orders);
    }

    // ---- what is wrong with a payload ----

    /// Turns down whatever contributions a payload that is here does not fit.
    fn judge(&mut self, payload: Digest, orders: &mut Vec<Order>) {
        let Some(seen) = self.arrived.get(&payload).cloned() else { return };
        for index in 0..self.rounds.len() {
            let receipts = self.rounds[index].pending.iter().filter(|(_, receipt)| receipt.payload == payload);
            let misfit = |(key, receipt): (&(SiteId, u64), &Receipt)| {
                Some((key.clone(), self.misfit(index, &seen, receipt.steps)?))
            };
            let misfits: Vec<_> = receipts.filter_map(misfit).collect();
            for ((owner, number), why) in misfits {
                self.turn_down(index, &why, |site, receipt| *site == owner && receipt.number == number, orders);
            }
        }
    }

    /// Why a payload can be no contribution of so many steps to fragment number `index`, if it cannot.
    fn misfit(&self, index: usize, &Seen { weights, norm, .. }: &Seen, steps: u64) -> Option<String> {
        let len = self.lens.get(index).copied().unwrap_or(0);
        if weights != len {
            return Some(format!("its payload is for {weights} weights, and {} has {len}", FragmentId(index as u16)));
        }
        let book = &self.book.fragments[index];
        let usual = book.longest.max(book.fastest * steps as f64);
        let most = MOVE_MAX * (len as f64).sqrt();
        let most = if usual > 0.0 { most.min(NORM_TIMES_MAX * usual) } else { most };
        let explained = norm.is_finite() && norm <= most;
        (!explained).then(|| format!("its length is {norm:.3e}, and {most:.3e} is the most that training can explain"))
    }

    /// Turns down the contributions in the round of fragment number `index` that `is_meant`, and tells whether there
    /// was one; what is being merged is beyond recall.
    pub(super) fn turn_down(
        &mut self,
        index: usize,
        why: &str,
        is_meant: impl Fn(&SiteId, &Receipt) -> bool,
        orders: &mut Vec<Order>,
    ) -> bool {
        let round = &self.rounds[index];
        let merging = |key: &(SiteId, u64)| round.merging.as_ref().is_some_and(|merge| merge.holds(key));
        let meant = round.pending.iter().filter(|(key, receipt)| is_meant(&key.0, receipt) && !merging(key));
        let keys: Vec<(SiteId, u64)> = meant.map(|(key, _)| key.clone()).collect();
        for key in &keys {
            if let Some(receipt) = self.rounds[index].pending.remove(key) {
                self.refuse(&key.0, &receipt, why, orders);
            }
        }
        !keys.is_empty()
    }

    // ---- payloads that come before their receipts ----

    /// Remembers a payload until its receipt comes; a site that sends ever more of them loses the oldest.
    fn keep_early(&mut self, site: &SiteId, payload: Digest, why: Option<String>, orders: &mut Vec<Order>) {
        let most = EARLY * self.rounds.len();
        let early = self.early.entry(site.clone()).or_default();
        early.retain(|(other, _)| *other != payload);
        early.push_back((payload, why));
        if early.len() > most
            && let Some((dropped, None)) = early.pop_front()
        {
            self.forget(dropped, orders);
        }
    }

    /// A payload's receipt has come: why it is useless, if it is.
    fn early_objection(&mut self, site: &SiteId, payload: Digest) -> Option<String> {
        let early = self.early.get_mut(site)?;
        let index = early.iter().position(|(other, _)| *other == payload)?;
        early.remove(index)?.1
    }
}
