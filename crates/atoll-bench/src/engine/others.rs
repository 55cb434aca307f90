//! Who else is on the machine: what processes beside the one whose turn it is took of the processors. A ratio
//! of a busy machine says little, since contenders suffer differently: threads that wait for each other in a
//! barrier lose more than threads that do not.

use std::fs;
use std::time::Instant;

/// Linux counts processor time in hundredths of a second.
const TICKS_PER_SECOND: f64 = 100.0;

/// Others' share of the processors below which a machine counts as quiet.
const QUIET: f64 = 0.05;

/// Processor time of everybody and of one process, at one moment.
pub(crate) struct Look {
    at: Instant,
    everybody_ticks: f64,
    one_ticks: f64,
}

/// The others' processor time during some turns.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Others {
    ticks: f64,
    possible_ticks: f64,
}

impl Look {
    /// `None` where there is no `/proc`.
    pub(crate) fn at(process: u32) -> Option<Self> {
        let everybody_ticks = everybody(&fs::read_to_string("/proc/stat").ok()?)?;
        let one_ticks = one(&fs::read_to_string(format!("/proc/{process}/stat")).ok()?)?;
        Some(Self { at: Instant::now(), everybody_ticks, one_ticks })
    }
}

impl Others {
    /// Adds what happened between two looks.
    pub(crate) fn add(&mut self, before: Option<&Look>, after: Option<&Look>) {
        let (Some(before), Some(after)) = (before, after) else { return };
        let cores = std::thread::available_parallelism().map_or(1, usize::from) as f64;
        let everybody = after.everybody_ticks - before.everybody_ticks;
        self.ticks += (everybody - (after.one_ticks - before.one_ticks)).max(0.0);
        self.possible_ticks += (after.at - before.at).as_secs_f64() * cores * TICKS_PER_SECOND;
    }

    /// Of all that the processors could have done; `None` if nobody looked.
    pub(crate) fn share(&self) -> Option<f64> {
        (self.possible_ticks > 0.0).then(|| (self.ticks / self.possible_ticks).min(1.0))
    }

    pub(crate) fn print(&self) {
        let Some(share) = self.share() else { return };
        let note = if share > QUIET { ": NOT A QUIET MACHINE, compare with care" } else { "" };
        println!("others took {:.0} % of the processors during the turns{note}", share * 100.0);
    }
}

/// Seconds of processor time that everybody together has used since the machine runs; `None` where there is
/// no `/proc`.
pub(crate) fn everybody_seconds() -> Option<f64> {
    Some(everybody(&fs::read_to_string("/proc/stat").ok()?)? / TICKS_PER_SECOND)
}

/// Busy ticks in `/proc/stat`: user, nice, system, interrupts (two kinds), stolen by other machines.
fn everybody(stat: &str) -> Option<f64> {
    let fields: Vec<f64> = stat.lines().next()?.split_whitespace().skip(1).filter_map(|f| f.parse().ok()).collect();
    [0, 1, 2, 5, 6, 7].iter().map(|&index| fields.get(index)).sum()
}

/// Ticks of one process, user's and system's, in its `/proc/PID/stat`, whose second field is a name in brackets.
fn one(stat: &str) -> Option<f64> {
    let (_, after_name) = stat.rsplit_once(')')?;
    let mut ticks = after_name.split_whitespace().skip(11).map(|field| field.parse::<f64>().ok());
    Some(ticks.next()?? + ticks.next()??)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_is_not_busy() {
        assert_eq!(everybody("cpu  10 20 30 4000 500 1 2 3 9 9\ncpu0 1"), Some(66.0));
        assert_eq!(everybody("cpu  10"), None);
    }

    #[test]
    fn a_name_may_hold_brackets() {
        assert_eq!(one("7 (a ) b) S 1 7 7 0 -1 4194304 1 2 3 4 50 6 0 0 20"), Some(56.0));
        assert_eq!(one("7"), None);
    }
}
