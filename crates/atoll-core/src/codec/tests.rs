//! Laws of all codecs, and golden bytes.

use super::*;
use crate::team::Job;
use proptest::prelude::*;

const SPARSE: &str = "04100000000002804000000000c0c0032205";

fn values() -> impl Strategy<Value = Vec<f32>> {
    prop::collection::vec(prop_oneof![-1.0f32..1.0, -1e-6f32..1e-6, -1e30f32..1e30, Just(0.0)], 0..400)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

proptest! {
    #[test]
    fn length_is_as_announced_and_a_second_trip_changes_nothing(values in values()) {
        for codec in Codec::ALL {
            let payload = codec.encode(&values).unwrap();
            prop_assert_eq!(payload.len(), codec.payload_len(values.len()));
            let once = decode(&payload, values.len()).unwrap();
            if !codec.is_partial() {
                let twice = decode(&codec.encode(&once).unwrap(), values.len()).unwrap();
                prop_assert_eq!(&once, &twice, "{:?}", codec);
            }
            if codec == Codec::F32 {
                prop_assert_eq!(&once, &values);
            }
        }
    }

    #[test]
    fn bf16_is_within_one_part_in_256(values in values()) {
        let back = decode(&Codec::Bf16.encode(&values).unwrap(), values.len()).unwrap();
        for (value, back) in values.iter().zip(back) {
            prop_assert!((value - back).abs() <= value.abs() / 256.0, "{value} {back}");
        }
    }

    /// Quantization keeps at least cos² = 0.9 of a normal block's energy and never turns it around.
    #[test]
    fn e3m0_points_where_the_block_points(seed: u64, size in 1usize..300, exponent in -20i32..20) {
        let mut rng = crate::rng::Rng::new(seed);
        let values: Vec<f32> = (0..size).map(|_| (rng.normal() * 2f64.powi(exponent)) as f32).collect();
        let back = decode(&Codec::E3m0.encode(&values).unwrap(), size).unwrap();
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
        let cosine = dot(&values, &back) / (dot(&values, &values) * dot(&back, &back)).sqrt();
        prop_assert!(cosine > 0.95, "{cosine}");
    }

    #[test]
    fn any_bytes_decode_or_are_refused(mut bytes in prop::collection::vec(any::<u8>(), 0..400), count in 0usize..600, tidy: bool) {
        if tidy && bytes.len() >= 5 {
            bytes[0] %= 7;
            bytes[1..5].copy_from_slice(&(count as u32).to_le_bytes());
            let keep = bytes.get(5).map_or(1, |byte| u16::from(*byte).max(1));
            let words = keep.min(8) as u8;
            let codecs =
                [Codec::F32, Codec::Bf16, Codec::E3m0, Codec::Sparse(keep), Codec::Tcq(words)];
            if let Some(&codec) = codecs.iter().find(|codec| codec.number() == bytes[0]) {
                bytes.resize(codec.payload_len(count).max(9), 0x5a);
                if let (Codec::Tcq(_), true) = (codec, count.is_multiple_of(2)) {
                    bytes[7..9].fill(0xff);
                }
                bytes.truncate(codec.payload_len(count).max(7));
                match codec {
                    Codec::Sparse(keep) => bytes[5..7].copy_from_slice(&keep.to_le_bytes()),
                    Codec::Tcq(words) => bytes[5] = words,
                    Codec::F32 | Codec::Bf16 | Codec::E3m0 => {}
                }
            }
        }
        if let Ok(values) = decode(&bytes, count) {
            prop_assert_eq!(values.len(), count);
            prop_assert!(values.iter().all(|value| value.is_finite()));
        }
    }
}

/// With l from its own n/k, a last chunk of 3,073 weights of which four are kept took a byte more than a whole one, and
/// was cut off.
#[test]
fn a_shorter_chunk_is_no_longer() {
    for keep in [1, 4, 5, 96, 224, 2048] {
        let bytes = |len: usize| Codec::Sparse(keep).payload_len(len);
        assert!((1..CHUNK).all(|len| bytes(len) <= bytes(len + 1)), "{keep}");
    }
    assert!((1..CHUNK).all(|len| Codec::Tcq(1).payload_len(len) <= Codec::Tcq(1).payload_len(len + 1)));
    let values = normal(0, 3073);
    let kept = decode(&Codec::Sparse(4).encode(&values).unwrap(), 3073).unwrap();
    assert_eq!(kept.iter().filter(|value| **value != 0.0).count(), 4);
}

#[test]
fn the_bytes_are_these() {
    let chunk: Vec<f32> = (0..16).map(|i| if i % 5 == 2 { i as f32 - 8.0 } else { 0.1 }).collect();
    // Two of 16 are kept: -6 at 2, negative and large, and 4 at 12, positive and small beside it.
    assert_eq!(hex(&Codec::Sparse(512).encode(&chunk).unwrap()), SPARSE);
    let values = [1.0, -0.5, 0.25, 0.0];
    assert_eq!(hex(&Codec::F32.encode(&values).unwrap()), "01040000000000803f000000bf0000803e00000000");
    assert_eq!(hex(&Codec::Bf16.encode(&values).unwrap()), "0204000000803f00bf803e0000");
    let e3m0 = hex(&Codec::E3m0.encode(&values).unwrap());
    assert_eq!(&e3m0[..18], "0304000000803fe705");
    assert!(e3m0[18..].bytes().all(|digit| digit == b'0'));
    // Without logarithms, which differ between the libraries of systems.
    let mut rng = crate::rng::Rng::new(1);
    let whole: Vec<f32> = (0..CHUNK).map(|_| (rng.unit() - 0.5) as f32).collect();
    assert_eq!(Digest::of(&Codec::Tcq(2).encode(&whole).unwrap()).short(), "249b11af80");
    let few_rows: Vec<f32> =
        whole.repeat(3).iter().enumerate().map(|(at, v)| if at / 128 % 11 < 2 { *v } else { 0.0 }).collect();
    assert_eq!(Digest::of(&Codec::Tcq(1).encode(&few_rows).unwrap()).short(), "260df98f16");
    assert_eq!(hex(&Codec::Tcq(1).encode(&chunk).unwrap()), "06100000000100263e7c930f9f24c3e7c9324c9324c9324c");
}

/// A quarter of a bit for each weight, spent on an eighth of them: seven words tell 86 % of what these have.
#[test]
fn where_few_rows_moved_they_are_told_nearly_whole() {
    let values = uneven(3, 40 * CHUNK);
    let payload = Codec::Tcq(1).encode(&values).unwrap();
    assert!(is_uneven(&payload) && !is_uneven(&Codec::Tcq(1).encode(&normal(3, 40 * CHUNK)).unwrap()));
    let left: Vec<f32> =
        values.iter().zip(decode(&payload, values.len()).unwrap()).map(|(value, said)| value - said).collect();
    let share = crate::delta::square(&left) / crate::delta::square(&values);
    assert!(share < 0.26, "{share}");
}

/// Of rows that it does not speak of it leaves all, of others what its words do.
#[test]
fn a_payload_is_taken_to_leave_less_the_more_it_says() {
    let count = 3 * CHUNK + 700;
    let payload = Codec::Tcq(2).encode(&uneven(3, count)).unwrap();
    let sound = Payload::check(&payload, count, &Alone).unwrap();
    assert!(is_uneven(&payload));
    for (up, times) in [(Codec::E3m0, 1.0), (Codec::Tcq(1), 0.5)] {
        let mut left = vec![1.0; count];
        sound.leave(up, &mut left);
        let (mut words_seen, values) = (std::collections::BTreeSet::new(), sound.values(&Alone));
        for (values, left) in values.chunks(128).zip(left.chunks(128)) {
            assert!(left.iter().all(|value| *value == left[0]));
            let words = (1..=15).find(|&words| (left[0] / times - 0.753f32.powi(words)).abs() < 1e-6);
            let is_silent = values.iter().all(|value| *value == 0.0);
            assert!(if is_silent { left[0] == 1.0 } else { words.is_some() }, "{}", left[0]);
            words_seen.extend(words.filter(|_| !is_silent));
        }
        assert!(words_seen.last() > Some(&2), "few rows are told in more than two words: {words_seen:?}");
    }
}

#[test]
fn an_uneven_piece_that_makes_no_sense_is_refused() {
    let count = 2 * CHUNK + 300;
    let values = uneven(3, count);
    let whole = Codec::Tcq(1).encode(&values).unwrap();
    let refused = |at: usize, bytes: &[u8]| {
        let mut payload = whole.clone();
        payload[at..at + bytes.len()].copy_from_slice(bytes);
        decode(&payload, count).is_err()
    };
    let (mark, first, last) = (7, 9, whole.len() - 1);
    assert!(is_uneven(&whole) && whole[first] >> 4 > 0, "it is about some rows");
    assert!(!refused(last, &[0]) && refused(last, &[1]), "bytes to spare");
    assert!(refused(mark, &[0]) && refused(mark + 1, &[0xfe]), "a gain below zero, or none");
    assert!(refused(first, &[0x41]), "rows of a kind that there is not");
    assert!(refused(first + 1, &[0xff; 4]), "more rows than it says");
    assert!(refused(first, &[0x0f, 0x0f]), "more words than there are bytes");
    // A chunk of 300 weights has three rows.
    let mut short = vec![0; Codec::Tcq(1).payload_len(300)];
    short[..7].copy_from_slice(&[6, 44, 1, 0, 0, 1, 0]);
    short[7..9].fill(0xff);
    assert_eq!(decode(&short, 300), Ok(vec![0.0; 300]), "nothing is said");
    short[9..14].copy_from_slice(&[0x30, 0xf0, 0, 0, 0]);
    assert_eq!(decode(&short, 300), Err(CodecError::Malformed { index: 0 }), "rows that there are not");
}

#[test]
fn what_is_not_finite_is_refused_both_ways() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for codec in Codec::ALL {
            assert_eq!(codec.encode(&[0.0, bad]), Err(CodecError::NonFinite { index: 1 }));
        }
    }
    let infinite = [2, 1, 0, 0, 0, 0x80, 0x7f];
    assert_eq!(decode(&infinite, 1), Err(CodecError::NonFinite { index: 0 }));
}

#[test]
fn wrong_lengths_are_named() {
    let payload = Codec::F32.encode(&[1.0; 3]).unwrap();
    assert_eq!(decode(&payload, 4), Err(CodecError::Count { found: 3, expected: 4 }));
    assert_eq!(decode(&payload[..9], 3), Err(CodecError::Length { found: 9, expected: 17 }));
    assert_eq!(decode(&[], 0), Err(CodecError::Length { found: 0, expected: 5 }));
    assert_eq!(decode(&[9, 0, 0, 0, 0], 0), Err(CodecError::UnknownCodec(9)));
}

fn normal(seed: u64, count: usize) -> Vec<f32> {
    let mut rng = crate::rng::Rng::new(seed);
    (0..count).map(|_| rng.normal() as f32).collect()
}

/// The same, but for what most rows of 128 have only a hundredth of.
fn uneven(seed: u64, count: usize) -> Vec<f32> {
    let mut values = normal(seed, count);
    let mut rng = crate::rng::Rng::new(!seed);
    for row in values.chunks_mut(128).filter(|_| !rng.chance(0.12)) {
        row.iter_mut().for_each(|value| *value *= 0.01);
    }
    values
}

fn either(seed: u64, count: usize) -> Vec<f32> {
    if seed.is_multiple_of(2) { normal(seed, count) } else { uneven(seed, count) }
}

fn is_uneven(payload: &[u8]) -> bool {
    payload[7..9] == [0xff; 2]
}

proptest! {
    /// What is left of a wish after encoding is exactly what the payload lacks, and never longer than the wish.
    #[test]
    fn the_rest_is_what_the_payload_lacks(seed: u64, count in 1usize..9000, scale in -20i32..20) {
        let wish: Vec<f32> = either(seed, count).iter().map(|value| value * 2f32.powi(scale)).collect();
        for codec in Codec::ALL {
            let mut rest = wish.clone();
            let payload = codec.encode_rest(&mut rest, &Alone).unwrap();
            let sent = decode(&payload, count).unwrap();
            for ((wish, sent), rest) in wish.iter().zip(&sent).zip(&rest) {
                prop_assert_eq!(wish - sent, *rest);
            }
            let length = |values: &[f32]| crate::delta::norm(values);
            prop_assert!(length(&rest) <= length(&wish) * 1.01, "{codec}");
        }
    }

    /// Exactly the greatest are kept, and each chunk on its own.
    #[test]
    fn sparse_keeps_the_greatest(seed: u64, count in 1usize..9000, keep in 1u16..400) {
        let values = normal(seed, count);
        let payload = Codec::Sparse(keep).encode(&values).unwrap();
        let sound = Payload::check(&payload, count, &Alone).unwrap();
        let mut kept = vec![false; count];
        sound.visit(0..count, |place, _| kept[place] = true);
        for (values, kept) in values.chunks(CHUNK).zip(kept.chunks(CHUNK)) {
            let wanted = (usize::from(keep) * values.len()).div_ceil(CHUNK);
            prop_assert_eq!(kept.iter().filter(|kept| **kept).count(), wanted);
            let magnitudes = |want: bool| values.iter().zip(kept).filter(move |(_, kept)| **kept == want).map(|(v, _)| v.abs());
            let (least, greatest) = (magnitudes(true).fold(f32::MAX, f32::min), magnitudes(false).fold(0.0, f32::max));
            prop_assert!(least >= greatest);
        }
    }

    /// A sparse payload's length is told from its levels alone, and nothing is lost by it.
    #[test]
    fn the_length_of_a_sparse_payload_is_that_of_its_values(seed: u64, count in 1usize..9000, keep in 1u16..400) {
        let payload = Codec::Sparse(keep).encode(&normal(seed, count)).unwrap();
        let sound = Payload::check(&payload, count, &Alone).unwrap();
        let mut square = 0.0;
        sound.visit(0..count, |_, value| square += f64::from(value) * f64::from(value));
        prop_assert_eq!(Squares::of(&sound, &Alone).norm(), square.sqrt());
    }

    /// So it is of every codec: lengths of chunks are lengths of values.
    #[test]
    fn the_length_of_a_payload_is_that_of_its_values(seed: u64, count in 1usize..300_000, kind in 0..Codec::ALL.len()) {
        let payload = Codec::ALL[kind].encode(&either(seed, count)).unwrap();
        let sound = Payload::check(&payload, count, &Alone).unwrap();
        let (told, length) = (Squares::of(&sound, &Alone).norm(), crate::delta::norm(&sound.values(&Alone)));
        prop_assert!((told - length).abs() <= 1e-6 * length, "{told} instead of {length}");
    }

    /// A merge unpacks what everybody else visits, and both find the same chunks malformed.
    #[test]
    fn a_chunk_unpacks_to_what_a_visit_shows(
        seed: u64, count in 1usize..4097, keep in 1u16..2049, damage in prop::option::of((0usize..9000, 0u8..8)),
    ) {
        let codec = Codec::Sparse(keep);
        let mut payload = codec.encode(&normal(seed, count)).unwrap();
        if let Some((at, bit)) = damage {
            let body = payload.len() - 7;
            payload[7 + at % body] ^= 1 << bit;
        }
        let parsed = Payload::parse(&payload, count).unwrap();
        let mut visited = Vec::new();
        let chunk = Chunk { len: count, bytes: &payload[7..], ..Chunk::default() };
        let is_sound = codec.each(0, chunk, |place, value| visited.push((place as u16, value))).is_some();
        let mut room = Unpacked::default();
        room.read(&parsed, 0, 0..count);
        let unpacked::Part::Sparse(values, places) = room.part() else { panic!("it is sparse") };
        let unpacked: Vec<(u16, f32)> = places.iter().copied().zip(values.iter().copied()).collect();
        prop_assert_eq!(unpacked, if is_sound { visited } else { Vec::new() });
    }

    /// Of every codec, wherever a tensor's border cuts a chunk.
    #[test]
    fn a_part_of_a_chunk_is_what_the_payload_says_of_it(
        seed: u64, count in 1usize..9000, ends in prop::collection::vec((0usize..=32, 0usize..3), 2),
    ) {
        let mut room = Unpacked::default();
        let payloads = Codec::ALL.map(|codec| codec.encode(&either(seed, count)).unwrap());
        for payload in &payloads {
            let payload = Payload::parse(payload, count).unwrap();
            let (values, number) = (payload.values(&Alone), seed as usize % count.div_ceil(CHUNK));
            let len = payload.chunk_len(number);
            // Borders of blocks, and one before and behind.
            let [a, b] = [0, 1].map(|end| (BLOCK * ends[end].0 + ends[end].1).saturating_sub(1).min(len));
            let range = a.min(b)..a.max(b);
            let values = &values[number * CHUNK..][range.clone()];
            let other = normal(seed ^ 1, values.len());
            room.read(&payload, number, range);
            for _ in 0..2 {
                let mut sum = vec![0.0; values.len()];
                room.part().add_to(1.0, &mut sum);
                prop_assert_eq!(&sum, values);
                let near = |found: f64, wanted: f64| (found - wanted).abs() <= 1e-12 * (1.0 + values.len() as f64);
                let found = [room.part().square(), room.part().along(&other)];
                prop_assert!(near(found[0], crate::delta::square(values)));
                prop_assert!(near(found[1], crate::delta::dot(values, &other)));
                room.unpack();
                prop_assert_eq!(found.map(f64::to_bits), [room.part().square(), room.part().along(&other)].map(f64::to_bits));
            }
        }
    }

    #[test]
    fn damaged_uneven_payloads_are_refused_or_decode_to_other_finite_values(seed: u64, at in 0usize..500, bit in 0u8..8) {
        let mut payload = Codec::Tcq(1).encode(&uneven(seed, 9000)).unwrap();
        // Most of what can be wrong is in the first bytes.
        let at = 7 + if at < 100 { at % 8 } else { at % (payload.len() - 7) };
        payload[at] ^= 1 << bit;
        if let Ok(values) = decode(&payload, 9000) {
            prop_assert!(values.iter().all(|value| value.is_finite()));
        }
    }

    #[test]
    fn damaged_sparse_payloads_are_refused_or_decode_to_other_finite_values(seed: u64, at in 7usize..500, bit in 0u8..8) {
        let mut payload = Codec::Sparse(96).encode(&normal(seed, 9000)).unwrap();
        let at = 7 + at % (payload.len() - 7);
        payload[at] ^= 1 << bit;
        if let Ok(values) = decode(&payload, 9000) {
            prop_assert!(values.iter().all(|value| value.is_finite()));
        }
    }
}

#[test]
fn ties_and_zeros_are_kept_in_order() {
    let payload = Codec::Sparse(2).encode(&[0.0; 4096]).unwrap();
    assert_eq!(decode(&payload, 4096).unwrap(), vec![0.0; 4096]);
    let payload = Codec::Sparse(2).encode(&[1.0; 4096]).unwrap();
    let values = decode(&payload, 4096).unwrap();
    assert_eq!((values[0], values[1], values[2]), (1.0, 1.0, 0.0));
}

#[test]
fn a_quarter_of_a_bit_goes_up_and_half_a_bit_down() {
    for (codec, bits) in
        [(Codec::Sparse(96), 0.25), (Codec::Tcq(1), 0.25), (Codec::Sparse(224), 0.5), (Codec::Tcq(2), 0.5)]
    {
        let taken = codec.payload_len(1 << 20) as f64 * 8.0 / f64::from(1 << 20);
        assert!(taken < bits, "{codec}: {taken}");
    }
}

#[test]
fn a_team_writes_and_reads_the_same() {
    struct Backwards;
    impl Team for Backwards {
        fn all(&self, jobs: Vec<Job<'_>>) {
            std::thread::scope(|scope| jobs.into_iter().rev().for_each(|job| drop(scope.spawn(job))));
        }
    }
    for (values, codec) in
        [normal(7, 2 * PIECE + 5000), uneven(7, 2 * PIECE + 5000)].iter().flat_map(|v| Codec::ALL.map(|c| (v, c)))
    {
        let (mut alone, mut shared) = (values.clone(), values.clone());
        let payload = codec.encode_rest(&mut alone, &Alone).unwrap();
        assert_eq!(payload, codec.encode_rest(&mut shared, &Backwards).unwrap());
        assert_eq!(alone, shared);
        let sound = Payload::check(&payload, values.len(), &Backwards).unwrap();
        assert_eq!(sound.values(&Alone), sound.values(&Backwards));
    }
}

#[test]
fn names_read_as_they_are_written() {
    for codec in Codec::ALL {
        assert_eq!(codec.to_string().parse(), Ok(codec));
    }
    for bad in ["", "sparse", "sparse:0", "sparse:2049", "tcq:0", "tcq:9", "tcq:300", "fp8"] {
        assert!(bad.parse::<Codec>().is_err(), "{bad}");
    }
}

/// With an error feedback everything arrives in the end.
#[test]
fn an_error_feedback_delivers_everything() {
    let codecs = [Codec::Sparse(96), Codec::Tcq(1), Codec::Tcq(2)];
    for (wish, codec) in [normal(1, 5000), uneven(1, 5000)].iter().flat_map(|wish| codecs.map(|codec| (wish, codec))) {
        let (mut rest, mut arrived) = (wish.clone(), vec![0.0f32; 5000]);
        for turn in 0..400 {
            let payload = codec.encode_prepared(&mut rest, turn as u8, &Alone, |_, _| {}).unwrap();
            Payload::check(&payload, 5000, &Alone).unwrap().add_to(&mut arrived, &Alone);
        }
        assert!(crate::delta::norm(&rest) < 0.02 * crate::delta::norm(wish), "{codec}");
        let most = wish.iter().zip(&arrived).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(most < 0.1, "{codec}: {most}");
    }
}
