//! A wide-area link in user space: thin, long and lossy, between two programs of one machine and
//! without any privilege. [`Wan`] says what the link is like, `50mbit,50ms,0.1%`; a [`Relay`] stands
//! between the two, takes TCP connections and hands their bytes on as that link would:
//!
//! ```text
//! piece read ──▶ queue of the link, one for each way ──▶ on its way ──▶ written
//!                rate: first come, first served          half a round trip + jitter, + a round
//!                full: reading stops                     trip for its connection if a packet is lost
//! ```
//!
//! What is left out: headers (the rate is that of TCP's payload), TCP's slow start and its slower
//! sending after a loss. A real link is somewhat slower where few connections share it. One thread copies
//! about a gigabit a second; a link cannot be faster than that.

mod path;
mod relay;

pub use relay::{Relay, relay};

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Result, bail};

/// What a link is like, the same on both ways.
///
/// Its text is a list of parts that are told apart by their units, in any order, each of which may be
/// left out: rate, round trip, jitter, loss, as in `50mbit,50ms,5ms,0.1%`. The first time is the whole
/// **round trip**, half of which is spent on each way; the second is the jitter.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Wan {
    /// Bits per second on each way, above 0; None is as fast as this machine.
    rate_bits: Option<u64>,
    round_trip_us: u32,
    jitter_us: u32,
    /// Lost packets among a million, below a million.
    loss_ppm: u32,
}

const HINT: &str = "hint: a link is rate, round trip, jitter and loss, or some of them, as in 50mbit,50ms,5ms,0.1%; units are kbit, mbit, gbit (bits a second), us, ms, s and %";

/// Slower links would need longer for their queue than a connection may be silent.
const RATE_BITS_MIN: u64 = 64_000;
const RATE_BITS_MAX: u64 = 1_000_000_000_000;
/// With more, two round trips and what waits before them come near the patience of a handshake.
const TIME_US_MAX: u64 = 5_000_000;
const MILLION: u32 = 1_000_000;

/// Names, and how many bits per second, microseconds or lost packets among a million they stand for.
const RATES: [(&str, u64); 3] = [("gbit", 1_000_000_000), ("mbit", 1_000_000), ("kbit", 1000)];
const TIMES: [(&str, u64); 3] = [("s", 1_000_000), ("ms", 1000), ("us", 1)];
const SHARES: [(&str, u64); 1] = [("%", 10_000)];

impl Wan {
    /// Time from one end to the other and back, without waiting and jitter.
    pub fn round_trip(&self) -> Duration {
        Duration::from_micros(self.round_trip_us.into())
    }

    /// The most that a piece comes too late on one way.
    pub fn jitter(&self) -> Duration {
        Duration::from_micros(self.jitter_us.into())
    }

    /// Share of the packets that are lost, 0 to 1.
    pub fn loss(&self) -> f64 {
        f64::from(self.loss_ppm) / f64::from(MILLION)
    }

    /// The link in words: what each number means.
    pub fn in_words(&self) -> String {
        let ms = |us: u32| format!("{} ms", decimal(us.into(), 1000));
        let rate =
            self.rate_bits.map_or("unlimited rate".to_string(), |bits| format!("{} each way", shown(bits, &RATES)));
        let mut words = vec![rate, format!("{} round trip", ms(self.round_trip_us))];
        if self.jitter_us > 0 {
            words.push(format!("up to {} jitter each way", ms(self.jitter_us)));
        }
        if self.loss_ppm > 0 {
            words.push(format!("{} % of the packets lost", decimal(self.loss_ppm.into(), 10_000)));
        }
        words.join(", ")
    }

    /// Time that so many bytes need to get onto the link, never too short.
    fn sending(&self, bytes: usize) -> Duration {
        let bits_e9 = bytes as u128 * 8 * 1_000_000_000;
        let ns = self.rate_bits.map_or(0, |rate| bits_e9.div_ceil(rate.into()));
        Duration::from_nanos(u64::try_from(ns).unwrap_or(u64::MAX))
    }
}

impl FromStr for Wan {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        if text.trim().is_empty() {
            bail!("nothing is said about the link\n{HINT}");
        }
        let (mut rates, mut times, mut losses) = (Vec::new(), Vec::new(), Vec::new());
        for part in text.split(',').map(str::trim) {
            let (number, unit) =
                part.split_at(part.find(|c: char| !"+-.0123456789 ".contains(c)).unwrap_or(part.len()));
            let scale = |units: &[(&str, u64)]| {
                units.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit)).map(|(_, scale)| *scale)
            };
            let (kind, scale) = match (scale(&RATES), scale(&TIMES), scale(&SHARES)) {
                (Some(scale), ..) => (&mut rates, scale),
                (_, Some(scale), _) => (&mut times, scale),
                (.., Some(scale)) => (&mut losses, scale),
                _ => bail!("'{part}' is no part of a link\n{HINT}"),
            };
            kind.push(amount(part, number.trim(), scale)?);
        }
        for (kind, most, what) in [(&rates, 1, "rate"), (&times, 2, "round trip and jitter"), (&losses, 1, "loss")] {
            if kind.len() > most {
                bail!("'{text}' says more than one {what}\n{HINT}");
            }
        }
        let time = |index: usize| times.get(index).copied().unwrap_or(0);
        Ok(Self {
            rate_bits: rates.first().copied().map(rate_within).transpose()?,
            round_trip_us: time_within(time(0), "a round trip")?,
            jitter_us: time_within(time(1), "jitter")?,
            loss_ppm: loss_within(losses.first().copied().unwrap_or(0))?,
        })
    }
}

fn rate_within(bits: u64) -> Result<u64> {
    if (RATE_BITS_MIN..=RATE_BITS_MAX).contains(&bits) {
        return Ok(bits);
    }
    bail!(
        "a rate of {} is too {}\nhint: between 64kbit and 1000gbit; without a rate, the link is as fast as this machine",
        shown(bits, &RATES),
        if bits < RATE_BITS_MIN { "low" } else { "high" }
    )
}

fn time_within(us: u64, what: &str) -> Result<u32> {
    match u32::try_from(us) {
        Ok(time) if us <= TIME_US_MAX => Ok(time),
        _ => {
            bail!("{what} of {}ms is too long\nhint: at most 5s, else no handshake is done in time", decimal(us, 1000))
        }
    }
}

fn loss_within(ppm: u64) -> Result<u32> {
    match u32::try_from(ppm) {
        Ok(loss) if loss < MILLION => Ok(loss),
        _ => bail!(
            "a loss of {}% lets nothing through\nhint: below 100%; long links lose 0.01% to 1%",
            decimal(ppm, 10_000)
        ),
    }
}

/// A plain decimal number times `scale`, if that is a whole number.
fn amount(part: &str, number: &str, scale: u64) -> Result<u64> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() || !digits(whole) || !digits(fraction) {
        bail!("'{part}' begins with no number of zero or more\n{HINT}");
    }
    let fraction = fraction.trim_end_matches('0');
    let exact = || {
        let power = 10u128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
        let above: u128 = if fraction.is_empty() { 0 } else { fraction.parse().ok()? };
        let above = above.checked_mul(scale.into())?;
        let total = whole.parse::<u128>().ok()?.checked_mul(scale.into())?.checked_add(above / power)?;
        if above % power == 0 { u64::try_from(total).ok() } else { None }
    };
    match exact() {
        Some(amount) => Ok(amount),
        None => bail!(
            "'{part}' is too large or too fine\nhint: whole bits a second, microseconds or millionths of loss are fine enough"
        ),
    }
}

/// `value / scale` (a power of ten) with as many decimals as it has.
fn decimal(value: u64, scale: u64) -> String {
    let width = scale.ilog10() as usize;
    let text = format!("{}.{:0width$}", value / scale, value % scale);
    text.trim_end_matches('0').trim_end_matches('.').to_string()
}

/// In the largest unit of which it has at least one.
fn shown(value: u64, units: &[(&str, u64)]) -> String {
    let (name, scale) = units.iter().find(|(_, scale)| value >= *scale).unwrap_or(&units[units.len() - 1]);
    format!("{}{name}", decimal(value, *scale))
}

impl fmt::Display for Wan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |us: u32| format!("{}ms", decimal(us.into(), 1000));
        let mut parts: Vec<String> = self.rate_bits.map(|bits| shown(bits, &RATES)).into_iter().collect();
        let perfect = parts.is_empty() && self.loss_ppm == 0;
        if self.round_trip_us > 0 || self.jitter_us > 0 || perfect {
            parts.push(ms(self.round_trip_us));
        }
        if self.jitter_us > 0 {
            parts.push(ms(self.jitter_us));
        }
        if self.loss_ppm > 0 {
            parts.push(format!("{}%", decimal(self.loss_ppm.into(), 10_000)));
        }
        f.pad(&parts.join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn wan(rate_bits: Option<u64>, round_trip_us: u32, jitter_us: u32, loss_ppm: u32) -> Wan {
        Wan { rate_bits, round_trip_us, jitter_us, loss_ppm }
    }

    #[test]
    fn parts_are_known_by_their_units() {
        for (text, expected, again) in [
            ("50mbit,50ms,0.1%", wan(Some(50_000_000), 50_000, 0, 1000), "50mbit,50ms,0.1%"),
            ("1gbit", wan(Some(1_000_000_000), 0, 0, 0), "1gbit"),
            ("10mbit,100ms", wan(Some(10_000_000), 100_000, 0, 0), "10mbit,100ms"),
            ("50mbit,50ms,5ms,0.1%", wan(Some(50_000_000), 50_000, 5000, 1000), "50mbit,50ms,5ms,0.1%"),
            ("2 %, 0.5 S , 250us,1.5Mbit", wan(Some(1_500_000), 500_000, 250, 20_000), "1.5mbit,500ms,0.25ms,2%"),
            ("0ms,3ms", wan(None, 0, 3000, 0), "0ms,3ms"),
            ("0.0001%", wan(None, 0, 0, 1), "0.0001%"),
            ("0ms", Wan::default(), "0ms"),
        ] {
            let link: Wan = text.parse().unwrap();
            assert_eq!((link, link.to_string()), (expected, again.to_string()), "{text}");
        }
    }

    #[test]
    fn words_tell_what_the_numbers_mean() {
        let words = |text: &str| text.parse::<Wan>().unwrap().in_words();
        let all = "50mbit each way, 50 ms round trip, up to 5 ms jitter each way, 0.1 % of the packets lost";
        assert_eq!(words("50mbit,50ms,5ms,0.1%"), all);
        assert_eq!(words("0.5ms"), "unlimited rate, 0.5 ms round trip");
    }

    #[test]
    fn nonsense_is_named_and_mended() {
        for (text, word) in [
            ("", "nothing"),
            (" ", "nothing"),
            ("50mbit,,1%", "''"),
            ("50", "'50'"),
            ("50mb", "50mb"),
            ("50MB/s", "50MB/s"),
            ("fast", "fast"),
            ("-5ms", "zero or more"),
            ("ms", "no number"),
            (".5ms", "no number"),
            ("1.2.3ms", "no number"),
            ("1 0ms", "no number"),
            ("∞ms", "no part"),
            ("0.1us", "too fine"),
            ("99999999999999999999999999999999999999999gbit", "too large"),
            ("1.00000000000000000000000000000000000000000000000001gbit", "too fine"),
            ("0mbit", "low"),
            ("9kbit", "9kbit is too low"),
            ("1001gbit", "high"),
            ("6s", "round trip of 6000ms"),
            ("1ms,6s", "jitter"),
            ("1ms,2ms,3ms", "more than one"),
            ("1mbit,2mbit", "more than one rate"),
            ("1%,2%", "more than one loss"),
            ("100%", "100% lets nothing"),
            ("250%", "250% lets nothing"),
        ] {
            let error = text.parse::<Wan>().unwrap_err().to_string();
            assert!(error.contains(word) && error.contains("\nhint: "), "{text}: {error}");
        }
    }

    #[test]
    fn bytes_need_their_time() {
        let link: Wan = "8mbit".parse().unwrap();
        assert_eq!(link.sending(1000), Duration::from_millis(1));
        assert_eq!(wan(Some(3_000_000_000), 0, 0, 0).sending(1), Duration::from_nanos(3), "rounded up");
        assert_eq!(Wan::default().sending(usize::MAX), Duration::ZERO);
    }

    prop_compose! {
        fn any_wan()(
            rate in proptest::option::of(RATE_BITS_MIN..=RATE_BITS_MAX),
            round_trip in 0..=TIME_US_MAX as u32,
            jitter in 0..=TIME_US_MAX as u32,
            loss in 0..MILLION,
            kept in 0u8..16,
        ) -> Wan {
            let keep = |bit: u8, value: u32| if kept & bit == 0 { 0 } else { value };
            wan(rate, keep(1, round_trip), keep(2, jitter), keep(4, loss))
        }
    }

    proptest! {
        #[test]
        fn what_is_written_can_be_read(link in any_wan()) {
            prop_assert_eq!(link.to_string().parse::<Wan>().unwrap(), link);
        }

        #[test]
        fn any_text_is_read_or_refused_with_a_hint(text in "[-+0-9a-z.,% ]{0,20}|\\PC*") {
            match text.parse::<Wan>() {
                Ok(link) => prop_assert_eq!(link.to_string().parse::<Wan>().unwrap(), link),
                Err(error) => prop_assert!(error.to_string().contains("\nhint: ")),
            }
        }
    }
}
