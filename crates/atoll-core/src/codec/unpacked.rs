//! A chunk of a payload, unpacked into a core's nearest cache: whoever needs its values more than once decodes them
//! once, and whatever the codec, they are then plain slices.

use std::ops::Range;

use super::Payload;
use crate::delta::dot;
use crate::simd::simd;

/// Sums that grow side by side.
const LANES: usize = 8;

/// Room for the values of one chunk of one payload.
#[derive(Debug, Default)]
pub(crate) struct Unpacked {
    values: Vec<f32>,
    /// Where they belong in the chunk, ascending; none if there is a value for every place.
    places: Vec<u16>,
    is_sparse: bool,
}

/// What a chunk says of some of its weights.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Part<'a> {
    /// All values.
    Dense(&'a [f32]),
    /// Values, and how far each is from the part's beginning.
    Sparse(&'a [f32], &'a [u16], u16),
}

impl Unpacked {
    /// Takes in chunk number `number` of a checked payload.
    pub(crate) fn read(&mut self, payload: &Payload<'_>, number: usize) {
        let (len, bytes) = payload.chunk(number);
        let most = payload.codec.values_of(len);
        self.is_sparse = payload.codec.is_sparse();
        self.values.resize(most, 0.0);
        self.places.resize(if self.is_sparse { most } else { 0 }, 0);
        let Self { values, places, is_sparse } = self;
        let found = simd(
            #[inline(always)]
            || {
                if !*is_sparse {
                    payload.codec.unpack(bytes, values);
                    return most;
                }
                let mut found = 0;
                let _ = payload.codec.each(bytes, len, |place, value| {
                    (values[found], places[found]) = (value, place as u16);
                    found += 1;
                });
                found
            },
        );
        self.values.truncate(found);
        self.places.truncate(found);
    }

    /// What it says of the weights at `range` in the chunk.
    pub(crate) fn part(&self, range: Range<usize>) -> Part<'_> {
        let Self { values, places, is_sparse } = self;
        if !is_sparse {
            return Part::Dense(&values[range]);
        }
        let from = places.partition_point(|&place| usize::from(place) < range.start);
        let to = places.partition_point(|&place| usize::from(place) < range.end);
        Part::Sparse(&values[from..to], &places[from..to], range.start as u16)
    }
}

impl Part<'_> {
    /// Squared length.
    pub(crate) fn square(self) -> f64 {
        let (Part::Dense(values) | Part::Sparse(values, ..)) = self;
        dot(values, values)
    }

    /// Dot product with the weights of the same stretch.
    pub(crate) fn along(self, other: &[f32]) -> f64 {
        match self {
            Part::Dense(values) => dot(values, other),
            Part::Sparse(values, places, first) => {
                let at = |place: u16| f64::from(other[usize::from(place - first)]);
                let mut lanes = [0.0f64; LANES];
                for (values, places) in values.chunks(LANES).zip(places.chunks(LANES)) {
                    for ((lane, value), place) in lanes.iter_mut().zip(values).zip(places) {
                        *lane += f64::from(*value) * at(*place);
                    }
                }
                lanes.iter().sum()
            }
        }
    }

    /// Adds `scale` times it to the weights of the same stretch.
    pub(crate) fn add_to(self, scale: f32, out: &mut [f32]) {
        match self {
            Part::Dense(values) => add_scaled(out, scale, values),
            Part::Sparse(values, places, first) => {
                for (value, place) in values.iter().zip(places) {
                    out[usize::from(place - first)] += scale * value;
                }
            }
        }
    }
}

/// Adds `scale` times `values` to `out`.
pub(crate) fn add_scaled(out: &mut [f32], scale: f32, values: &[f32]) {
    simd(
        #[inline(always)]
        || {
            for (out, value) in out.iter_mut().zip(values) {
                *out += scale * value;
            }
        },
    );
}
