//! Arithmetic of pace: how many steps a site should take, how long a round should wait.

/// Inner steps for a site that takes `step_seconds` each, when the fastest takes `fastest_seconds` and
/// is to take `steps`: all finish together (dynamic local updates, arXiv 2401.09135, section 5).
pub fn steps_for(steps: u32, step_seconds: f64, fastest_seconds: f64) -> u32 {
    if step_seconds <= 0.0 || fastest_seconds <= 0.0 {
        return steps;
    }
    let share = (fastest_seconds / step_seconds).min(1.0);
    ((f64::from(steps) * share).round() as u32).max(1)
}

/// Seconds that a round stays open after its quorum: γ·(τ·ξ_step − ξ_quorum − ξ_sync), never negative
/// (Decoupled DiLoCo, arXiv 2604.21428). `window` is τ·ξ_step, the time within which nobody misses the
/// commit; `quorum` and `sync` are what reaching the quorum and sending the commit usually take.
pub fn grace_seconds(window: f64, quorum: f64, sync: f64) -> f64 {
    const GAMMA: f64 = 0.5;
    (GAMMA * (window - quorum - sync)).max(0.0)
}

/// Exponential moving average with weight `share` for the new value; the first value starts it.
pub fn smooth(average: f64, value: f64, share: f64) -> f64 {
    if average == 0.0 { value } else { average + share * (value - average) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slow_sites_take_fewer_steps_and_finish_together() {
        assert_eq!(steps_for(16, 1.0, 1.0), 16);
        assert_eq!(steps_for(16, 4.0, 1.0), 4);
        assert_eq!(steps_for(16, 100.0, 1.0), 1);
        assert_eq!(steps_for(16, 0.0, 1.0), 16);
    }

    #[test]
    fn grace_is_what_the_window_leaves() {
        assert_eq!(grace_seconds(4.0, 1.0, 1.0), 1.0);
        assert_eq!(grace_seconds(1.0, 1.0, 1.0), 0.0);
    }
}
