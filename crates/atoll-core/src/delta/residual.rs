//! What a codec has not delivered yet, and how a site remembers it from one process to the next.
//!
//! A residual belongs to the contribution that left it. The coordinator knows which contribution of a site was the last
//! to enter the model, and says so to a site that starts. So nothing is delivered twice, whatever died and whenever: a
//! residual is taken up if it is what *that* contribution left, or less than that.
//!
//! ```text
//! file      | layout: 32 | part …                         (one file for each fragment; little endian throughout)
//! part      0      1           33          65           73
//!           | kind | after: 32 | check: 32 | bytes: u64 | body … |       check = hash of the body
//! kind  1   Left   the residual, count × f32, that the contribution `after` has left
//!       2   Sent   the payload of the later contribution `after`: what it speaks of is not owed any more
//! ```
//!
//! A site writes `Left` now and then, and adds `Sent` with every contribution, which costs little. After a crash the
//! newest `Left` without what was sent since is still owed; what was learnt since and not sent is lost. A site that
//! stops in an orderly way writes `Left` twice: as its last contribution leaves it, and as it is without that one.

use crate::codec::Payload;
use crate::hash::{Digest, from_little_endian, little_endian};
use crate::team::Alone;

/// What is owed to the model, and the contribution, by its payload's address, that left it.
#[derive(Debug, Clone, PartialEq)]
pub struct Residual {
    /// The contribution.
    pub after: Digest,
    /// Pseudo-gradient that is not delivered.
    pub values: Vec<f32>,
}

const LEFT: u8 = 1;
const SENT: u8 = 2;
const HEAD: usize = 73;

/// The beginning of a file: it is of no use for another layout.
pub fn file(layout: Digest) -> Vec<u8> {
    layout.0.to_vec()
}

/// The part that says what a contribution has left.
pub fn left(Residual { after, values }: &Residual) -> Vec<u8> {
    let mut part = head(LEFT, *after, Digest::of_weights(values), 4 * values.len());
    part.extend_from_slice(&little_endian(values));
    part
}

/// The part that says what a contribution has sent.
pub fn sent(payload: &[u8]) -> Vec<u8> {
    let address = Digest::of(payload);
    let mut part = head(SENT, address, address, payload.len());
    part.extend(payload);
    part
}

/// What is owed if `delivered` was the last contribution to enter the model; nothing if the file does not know. What
/// follows a part that is cut short or damaged is not looked at.
pub fn recall(file: &[u8], layout: Digest, count: usize, delivered: Digest) -> Option<Residual> {
    let mut rest = file.strip_prefix(&layout.0)?;
    let (mut owed, mut found) = (None, None);
    while let Some((kind, after, body, behind)) = take_part(rest) {
        owed = match kind {
            LEFT => values(body, count),
            SENT => owed.and_then(|owed| without(owed, body)),
            _ => None,
        };
        let Some(owed) = &owed else { break };
        if after == delivered {
            if kind == LEFT && found.is_some() {
                return None; // Two contributions had the same bytes, and nobody knows which is the last in the model.
            }
            found = Some(owed.clone());
        }
        rest = behind;
    }
    found.map(|values| Residual { after: delivered, values })
}

/// What comes before the body of a part.
fn head(kind: u8, after: Digest, check: Digest, bytes: usize) -> Vec<u8> {
    let mut head = Vec::with_capacity(HEAD + bytes);
    head.push(kind);
    [&after.0[..], &check.0, &(bytes as u64).to_le_bytes()].iter().for_each(|field| head.extend(*field));
    head
}

/// Kind, contribution and body of the first part, and what is behind it.
fn take_part(bytes: &[u8]) -> Option<(u8, Digest, &[u8], &[u8])> {
    let (head, rest) = bytes.split_first_chunk::<HEAD>()?;
    let digest = |at: usize| head[at..].first_chunk().copied().map(Digest);
    let length = u64::from_le_bytes(*head[65..].first_chunk()?);
    let (body, rest) = rest.split_at_checked(usize::try_from(length).ok()?)?;
    (Digest::of(body) == digest(33)?).then_some((head[0], digest(1)?, body, rest))
}

fn values(body: &[u8], count: usize) -> Option<Vec<f32>> {
    let values = from_little_endian(body);
    (body.len() == 4 * count && values.iter().all(|value| value.is_finite())).then_some(values)
}

/// Nothing is owed any more where a payload has spoken.
fn without(mut owed: Vec<f32>, payload: &[u8]) -> Option<Vec<f32>> {
    let payload = Payload::check(payload, owed.len(), &Alone).ok()?;
    payload.silence(&mut owed);
    Some(owed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::Codec;
    use proptest::prelude::*;

    const LAYOUT: Digest = Digest([7; 32]);

    fn residual(name: &[u8], values: &[f32]) -> Residual {
        Residual { after: Digest::of(name), values: values.to_vec() }
    }

    #[test]
    fn what_was_sent_since_is_not_owed() {
        let (a, b) = (residual(b"a", &[1.0, 2.0, 3.0, 4.0]), residual(b"b", &[9.0; 4]));
        let payload = Codec::Sparse(1024).encode(&[0.0, 8.0, 0.0, 0.0]).unwrap();
        let crashed = [file(LAYOUT), left(&a), sent(&payload)].concat();
        let recalled = |file: &[u8], after: Digest| recall(file, LAYOUT, 4, after).map(|residual| residual.values);
        assert_eq!(recalled(&crashed, a.after), Some(a.values.clone()), "the later contribution was dropped");
        assert_eq!(recalled(&crashed, Digest::of(&payload)), Some(vec![1.0, 0.0, 3.0, 4.0]), "it was merged");
        assert_eq!(recalled(&crashed, b.after), None, "a contribution that the file has never heard of");
        let stopped = [file(LAYOUT), left(&a), left(&b)].concat();
        assert_eq!((recalled(&stopped, a.after), recalled(&stopped, b.after)), (Some(a.values), Some(b.values)));
        assert_eq!(recall(&stopped, Digest([8; 32]), 4, b.after), None, "of another layout");
        assert_eq!(recall(&stopped, LAYOUT, 5, b.after), None, "of another length");
    }

    #[test]
    fn a_part_that_was_cut_short_or_damaged_ends_the_file() {
        let (a, b) = (residual(b"a", &[1.0]), residual(b"b", &[2.0]));
        let whole = [file(LAYOUT), left(&a), left(&b)].concat();
        for end in 0..whole.len() {
            assert_eq!(recall(&whole[..end], LAYOUT, 1, b.after), None);
            let first = 32 + HEAD + 4;
            assert_eq!(recall(&whole[..end], LAYOUT, 1, a.after).is_some(), end >= first);
        }
        let mut damaged = whole.clone();
        damaged[32 + HEAD] ^= 1;
        assert_eq!(recall(&damaged, LAYOUT, 1, b.after), None);
    }

    #[test]
    fn a_part_that_makes_no_sense_ends_the_file() {
        let a = residual(b"a", &[1.0, 2.0]);
        let longer = left(&residual(b"b", &[1.0; 3]));
        let unknown = part(3, LAYOUT, b"from a later program");
        for strange in [sent(b"no payload"), longer, unknown] {
            let behind = sent(&Codec::Sparse(1024).encode(&[0.0, 8.0]).unwrap());
            let file = [file(LAYOUT), left(&a), strange, behind.clone()].concat();
            assert_eq!(recall(&file, LAYOUT, 2, a.after), Some(a.clone()));
            assert_eq!(recall(&file, LAYOUT, 2, Digest::of(&behind[HEAD..])), None);
        }
    }

    #[test]
    fn of_two_contributions_with_the_same_bytes_the_lesser_is_owed() {
        let (payload, untouched) = (Codec::Sparse(1024).encode(&[0.0, 8.0]).unwrap(), 3.0);
        let address = Digest::of(&payload);
        let (first, second) = ([untouched, 1.0], [untouched + 0.5, 1.5]);
        let [first, second] = [first, second].map(|values| Residual { after: address, values: values.to_vec() });
        let stopped = [file(LAYOUT), left(&first), left(&second)].concat();
        assert_eq!(recall(&stopped, LAYOUT, 2, address), None);
        let killed = [file(LAYOUT), left(&first), sent(&payload)].concat();
        let values = vec![untouched, 0.0];
        assert_eq!(recall(&killed, LAYOUT, 2, address), Some(Residual { after: address, values }));
    }

    fn part(kind: u8, after: Digest, body: &[u8]) -> Vec<u8> {
        [head(kind, after, Digest::of(body), body.len()), body.to_vec()].concat()
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_left_alone(bytes in prop::collection::vec(any::<u8>(), 0..300), kind in 0u8..4) {
            let file = [file(LAYOUT), part(kind, LAYOUT, &bytes), bytes.clone()].concat();
            if let Some(residual) = recall(&file, LAYOUT, bytes.len() / 4, LAYOUT) {
                prop_assert!(residual.values.iter().all(|value| value.is_finite()));
            }
        }
    }
}
