//! Sets of positions as sorted, disjoint, non-adjacent half-open intervals.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// A set of `u64` positions; small as long as the set has few gaps.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Vec<(u64, u64)>", into = "Vec<(u64, u64)>")]
pub struct Ranges {
    /// Start to end of each interval.
    spans: BTreeMap<u64, u64>,
}

impl Ranges {
    /// The empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// The set `start..end`; empty unless `start < end`.
    pub fn span(start: u64, end: u64) -> Self {
        let mut ranges = Self::new();
        ranges.insert_span(start, end);
        ranges
    }

    /// Number of positions.
    pub fn len(&self) -> u64 {
        self.spans.iter().map(|(start, end)| end - start).sum()
    }

    /// Whether the set is empty.
    pub fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    /// The intervals, ascending.
    pub fn spans(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.spans.iter().map(|(&start, &end)| (start, end))
    }

    /// Whether `start..end` is wholly inside.
    pub fn contains_span(&self, start: u64, end: u64) -> bool {
        start >= end || self.spans.range(..=start).next_back().is_some_and(|(_, &e)| end <= e)
    }

    /// Whether every position of `other` is inside.
    pub fn contains(&self, other: &Ranges) -> bool {
        other.spans().all(|(start, end)| self.contains_span(start, end))
    }

    /// Whether some position is in both.
    pub fn intersects(&self, other: &Ranges) -> bool {
        other.spans().any(|(start, end)| self.spans.range(..end).next_back().is_some_and(|(_, &e)| start < e))
    }

    /// Adds `start..end`, merging what touches.
    pub fn insert_span(&mut self, mut start: u64, mut end: u64) {
        if start >= end {
            return;
        }
        while let Some((&s, &e)) = self.spans.range(..=end).next_back().filter(|&(_, &e)| e >= start) {
            self.spans.remove(&s);
            (start, end) = (start.min(s), end.max(e));
        }
        self.spans.insert(start, end);
    }

    /// Adds every position of `other`.
    pub fn insert(&mut self, other: &Ranges) {
        other.spans().for_each(|(start, end)| self.insert_span(start, end));
    }

    /// Removes `start..end`.
    pub fn remove_span(&mut self, start: u64, end: u64) {
        if start >= end {
            return;
        }
        while let Some((&s, &e)) = self.spans.range(..end).next_back().filter(|&(_, &e)| e > start) {
            self.spans.remove(&s);
            if s < start {
                self.spans.insert(s, start);
            }
            if end < e {
                self.spans.insert(end, e);
            }
        }
    }

    /// Removes every position of `other`.
    pub fn remove(&mut self, other: &Ranges) {
        other.spans().for_each(|(start, end)| self.remove_span(start, end));
    }

    /// Takes out the `count` lowest positions, or all if there are fewer.
    pub fn take_first(&mut self, count: u64) -> Ranges {
        let mut taken = Ranges::new();
        let mut left = count;
        while left > 0
            && let Some((start, end)) = self.spans.pop_first()
        {
            let cut = end.min(start.saturating_add(left));
            taken.insert_span(start, cut);
            self.insert_span(cut, end);
            left -= cut - start;
        }
        taken
    }
}

impl From<Vec<(u64, u64)>> for Ranges {
    fn from(spans: Vec<(u64, u64)>) -> Self {
        let mut ranges = Self::new();
        spans.into_iter().for_each(|(start, end)| ranges.insert_span(start, end));
        ranges
    }
}

impl From<Ranges> for Vec<(u64, u64)> {
    fn from(ranges: Ranges) -> Self {
        ranges.spans.into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    type Edit = (u8, u64, u64);

    fn apply(edits: &[Edit]) -> (Ranges, BTreeSet<u64>) {
        let (mut ranges, mut model) = (Ranges::new(), BTreeSet::new());
        for &(kind, start, len) in edits {
            match kind % 3 {
                0 | 1 => {
                    ranges.insert_span(start, start + len);
                    model.extend(start..start + len);
                }
                _ => {
                    ranges.remove_span(start, start + len);
                    model.retain(|p| !(start..start + len).contains(p));
                }
            }
        }
        (ranges, model)
    }

    fn edits() -> impl Strategy<Value = Vec<Edit>> {
        prop::collection::vec((any::<u8>(), 0u64..60, 0u64..12), 0..30)
    }

    proptest! {
        #[test]
        fn behaves_like_a_set_of_positions(edits in edits(), count in 0u64..40, a in 0u64..70, len in 0u64..20) {
            let (mut ranges, mut model) = apply(&edits);
            let listed: BTreeSet<u64> = ranges.spans().flat_map(|(s, e)| s..e).collect();
            prop_assert_eq!(&listed, &model);
            prop_assert_eq!(ranges.len(), model.len() as u64);
            prop_assert_eq!(ranges.contains_span(a, a + len), (a..a + len).all(|p| model.contains(&p)));
            prop_assert_eq!(ranges.intersects(&Ranges::span(a, a + len)), (a..a + len).any(|p| model.contains(&p)));
            let spans: Vec<_> = ranges.spans().collect();
            prop_assert!(spans.windows(2).all(|w| w[0].1 < w[1].0), "adjacent spans must be merged: {spans:?}");
            let taken = ranges.take_first(count);
            let expected: BTreeSet<u64> = model.iter().copied().take(count as usize).collect();
            model.retain(|p| !expected.contains(p));
            prop_assert_eq!(taken.spans().flat_map(|(s, e)| s..e).collect::<BTreeSet<_>>(), expected);
            prop_assert_eq!(ranges.spans().flat_map(|(s, e)| s..e).collect::<BTreeSet<_>>(), model);
        }
    }
}
