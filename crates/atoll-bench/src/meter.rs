//! What a process uses, by the kernel's own counters: the bytes of the network interfaces that it sits
//! behind, and its processor time. A kernel that hands segments to its driver in trains (GSO) counts the
//! headers of a train once.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Result;
use serde::{Deserialize, Serialize};

/// Seconds between two readings.
const PAUSE: Duration = Duration::from_millis(100);

/// What was counted up to a moment, in seconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct Reading {
    pub(crate) at: f64,
    pub(crate) sent: u64,
    pub(crate) received: u64,
    /// Seconds of processor time of the whole process.
    pub(crate) cpu_seconds: f64,
}

/// Writes a line per reading from now on, as long as the process lives.
pub(crate) fn start(path: &Path) -> Result<()> {
    let mut file = OpenOptions::new().create(true).append(true).open(path)?;
    std::thread::spawn(move || {
        loop {
            // A reading that cannot be taken or kept is one less; nobody is harmed.
            if let Some(line) = reading().and_then(|reading| serde_json::to_string(&reading).ok()) {
                let _ = file.write_all(format!("{line}\n").as_bytes());
            }
            std::thread::sleep(PAUSE);
        }
    });
    Ok(())
}

/// All readings so far.
pub(crate) fn read(path: &Path) -> Vec<Reading> {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

fn reading() -> Option<Reading> {
    let table = fs::read_to_string("/proc/self/net/dev").ok()?;
    let at = SystemTime::now().duration_since(UNIX_EPOCH).ok()?.as_secs_f64();
    let (sent, received) = sums(&table);
    let cpu_seconds = cpu_time::ProcessTime::now().as_duration().as_secs_f64();
    Some(Reading { at, sent, received, cpu_seconds })
}

/// Bytes sent and received over all interfaces but the one to itself.
fn sums(table: &str) -> (u64, u64) {
    let lines = table.lines().filter_map(|line| line.split_once(':'));
    let outward = lines.filter(|(name, _)| name.trim() != "lo").map(|(_, counts)| {
        let counts: Vec<u64> = counts.split_whitespace().filter_map(|count| count.parse().ok()).collect();
        let count = |index: usize| counts.get(index).copied().unwrap_or(0);
        (count(8), count(0))
    });
    outward.fold((0, 0), |sum, counts| (sum.0 + counts.0, sum.1 + counts.1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_to_oneself_is_not_counted() {
        let table = "Inter-|   Receive                     |  Transmit\n\
             face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs\n\
             \x20   lo: 900 9 0 0 0 0 0 0 900 9 0 0 0 0 0 0\n\
             \x20 wan0: 1500 1 0 0 0 0 0 0 52 1 0 0 0 0 0 0\n";
        assert_eq!(sums(table), (52, 1500));
    }
}
