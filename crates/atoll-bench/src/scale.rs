//! What a round costs its coordinator: with how many contributions, to how large a model, among how many sites that
//! are connected and contribute nothing.
//!
//! ```text
//! machine    deciding: statuses in, standings out, leases, ledger, journal entries as values
//! payloads   each contribution's bytes: hashed, checked, measured
//! step       contributions merged, Θ moved, the change encoded and hashed
//! own        the step without any contribution: what is left of a round when nobody takes part
//! ```
//!
//! Not in it: sockets, TLS and the disk. A round is one fragment's, a quarter of the model, as by default. Costs are
//! processor seconds, all threads together, because a machine that is shared changes these least; `passed` is the time
//! on the wall. Every figure is the median of some rounds after a first one that is not counted.
//!
//! The claim is that a round's cost is its own share, linear in the size, and beyond it linear in contributions × size:
//! then the last column is the same in every row, and the fitted exponents are 1. And that idle sites cost nothing.

mod fit;
mod fleet;

use anyhow::Result;
use atoll_core::manifest::{FragmentId, Manifest};
use atoll_core::plan;

use crate::{Figures, median};
use fleet::{Cost, Fleet, Model};

/// Contributions to a round beside which sites are idle.
const BESIDE_IDLE: usize = 8;
/// Rows whose contributions cost less than this share of a step without any do not count in the fitted exponents.
const TELLING: f64 = 1.0;
/// Share of the free memory that a row may take.
const MEMORY_SHARE: f64 = 0.8;

/// How much is measured.
struct Extent {
    presets: &'static [&'static str],
    contributions: &'static [usize],
    /// Models and numbers of idle sites of the second table.
    idle_presets: &'static [&'static str],
    idle: &'static [usize],
    rounds: usize,
}

const QUICK: Extent = Extent {
    presets: &["nano", "mini", "small"],
    contributions: &[2, 8, 32, 128, 256],
    idle_presets: &["nano", "mini"],
    idle: &[0, 8, 56, 248],
    rounds: 3,
};

const FULL: Extent = Extent {
    presets: &["nano", "mini", "small", "large"],
    contributions: &[2, 4, 8, 16, 32, 64, 128, 256],
    idle_presets: &["nano", "mini", "small"],
    idle: &[0, 8, 24, 56, 120, 248],
    rounds: 5,
};

pub(crate) fn run(quick: bool) -> Result<Figures> {
    let extent = if quick { QUICK } else { FULL };
    let busy = busy_rows(&extent)?;
    let idle = idle_rows(&extent)?;
    Ok(figures(&busy, &idle))
}

/// A row of either table.
struct Row {
    preset: &'static str,
    parameters: usize,
    /// Weights of the fragment.
    weights: usize,
    contributions: usize,
    idle: usize,
    /// Processor seconds of a step without contributions.
    own: f64,
    cost: Cost,
}

impl Row {
    /// Nanoseconds for each weight of each contribution, beyond the round's own share.
    fn nanoseconds_each(&self) -> f64 {
        1e9 * self.beyond() / (self.contributions * self.weights) as f64
    }

    fn beyond(&self) -> f64 {
        self.cost.together() - self.own
    }
}

// ---- contributions × size ----

fn busy_rows(extent: &Extent) -> Result<Vec<Row>> {
    println!("processor milliseconds of one round; medians of {} rounds\n", extent.rounds);
    println!(
        "        parameters   contri-      own   machine   payloads        step   together     passed   beyond own, ns"
    );
    println!(
        "                     butions                                                                   each and weight"
    );
    let mut rows = Vec::new();
    for preset in extent.presets {
        let manifest = Model::layout(preset)?;
        let Some(most) = most_that_fit(preset, &manifest, extent.contributions) else { continue };
        let parameters = manifest.parameters();
        let mut model = Model::new(manifest)?;
        // First some rounds, so that the residual is that of a run: what is all alike takes longer to choose from.
        rounds(&mut model, BESIDE_IDLE, 0, extent.rounds)?;
        let own = measure(extent.rounds, || model.step_alone())?.together();
        for &contributions in extent.contributions.iter().filter(|&&contributions| contributions <= most) {
            let cost = rounds(&mut model, contributions, 0, extent.rounds)?;
            let row = Row { preset, parameters, weights: model.weights(), contributions, idle: 0, own, cost };
            print_busy(&row);
            rows.push(row);
        }
    }
    Ok(rows)
}

fn print_busy(row: &Row) {
    let Cost { machine, payloads, step, wall } = row.cost;
    println!(
        "{:6} {:9.1} M   {:7} {:8.1} {:9.2} {:10.1} {:11.1} {:10.1} {:10.1}   {:14.3}",
        row.preset,
        row.parameters as f64 / 1e6,
        row.contributions,
        1e3 * row.own,
        1e3 * machine,
        1e3 * payloads,
        1e3 * step,
        1e3 * row.cost.together(),
        1e3 * wall,
        row.nanoseconds_each()
    );
}

/// The most of these numbers of contributions for which the memory suffices; says what is left out.
fn most_that_fit(preset: &str, manifest: &Manifest, contributions: &[usize]) -> Option<usize> {
    let weights = manifest.fragment_len(FragmentId(0)).unwrap_or(0);
    let Some(free) = free_memory() else { return contributions.last().copied() };
    let fits = |contributions: usize| memory(weights, contributions) <= MEMORY_SHARE * free;
    for &left_out in contributions.iter().filter(|&&contributions| !fits(contributions)) {
        println!(
            "{preset:6} with {left_out} contributions is left out: it takes {:.1} GiB, and {:.1} GiB are free",
            memory(weights, left_out) / GIB,
            free / GIB
        );
    }
    contributions.iter().copied().filter(|&contributions| fits(contributions)).max()
}

const GIB: f64 = (1u64 << 30) as f64;

/// Bytes that a round needs: Θ, momentum, residual and merge of the fragment, the residual that payloads are made
/// with, and all payloads.
fn memory(weights: usize, contributions: usize) -> f64 {
    (5 * 4 * weights + (contributions + 8) * plan::THINNEST.0.payload_len(weights)) as f64
}

/// Bytes that the system can give; `None` where it does not say.
fn free_memory() -> Option<f64> {
    let table = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = table.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kilobytes: f64 = line.trim().trim_end_matches(" kB").parse().ok()?;
    Some(1024.0 * kilobytes)
}

// ---- idle sites ----

fn idle_rows(extent: &Extent) -> Result<Vec<Row>> {
    println!("\nthe same with {BESIDE_IDLE} contributions, beside idle sites\n");
    println!("        parameters      idle   machine   together   to without idle   microseconds an idle site");
    let mut rows: Vec<Row> = Vec::new();
    for preset in extent.idle_presets {
        let manifest = Model::layout(preset)?;
        let parameters = manifest.parameters();
        let mut model = Model::new(manifest)?;
        let first = rows.len();
        for &idle in extent.idle {
            let cost = rounds(&mut model, BESIDE_IDLE, idle, extent.rounds)?;
            let (weights, contributions) = (model.weights(), BESIDE_IDLE);
            rows.push(Row { preset, parameters, weights, contributions, idle, own: 0.0, cost });
            print_idle(&rows[rows.len() - 1], &rows[first]);
        }
    }
    Ok(rows)
}

fn print_idle(row: &Row, without: &Row) {
    println!(
        "{:6} {:9.1} M   {:7} {:9.2} {:10.1}   {:15.3}   {:25.1}",
        row.preset,
        row.parameters as f64 / 1e6,
        row.idle,
        1e3 * row.cost.machine,
        1e3 * row.cost.together(),
        row.cost.together() / without.cost.together(),
        1e6 * per_idle_site(row, without)
    );
}

/// Seconds that the machine spends on each idle site; 0 without any.
fn per_idle_site(row: &Row, without: &Row) -> f64 {
    (row.cost.machine - without.cost.machine) / row.idle.max(1) as f64
}

// ---- both ----

/// Median costs of a round of so many contributions beside so many idle sites.
fn rounds(model: &mut Model, contributions: usize, idle: usize, rounds: usize) -> Result<Cost> {
    let mut fleet = Fleet::new(model, contributions, idle)?;
    measure(rounds, || fleet.round(model))
}

fn measure(rounds: usize, mut round: impl FnMut() -> Result<Cost>) -> Result<Cost> {
    round()?;
    let costs = (0..rounds).map(|_| round()).collect::<Result<Vec<_>>>()?;
    let middle = |part: fn(&Cost) -> f64| median(costs.iter().map(part).collect());
    Ok(Cost {
        machine: middle(|cost| cost.machine),
        payloads: middle(|cost| cost.payloads),
        step: middle(|cost| cost.step),
        wall: middle(|cost| cost.wall),
    })
}

fn figures(busy: &[Row], idle: &[Row]) -> Figures {
    // Where contributions cost little beside the own share, the difference is noise.
    let telling = busy.iter().filter(|row| row.beyond() > TELLING * row.own);
    let beyond: Vec<_> = telling.map(|row| (row.weights as f64, row.contributions as f64, row.beyond())).collect();
    let (size, contributions) = fit::exponents(&beyond);
    let own: Vec<_> = busy.iter().map(|row| (row.weights as f64, row.own)).collect();
    let own = fit::exponent(&own);
    println!("\nown share ~ size^{own:.2}; beyond it, cost ~ size^{size:.2} × contributions^{contributions:.2}");
    let each = median(busy.iter().map(Row::nanoseconds_each).collect());
    let mut figures = Figures::from([
        ("own_size_exponent".to_string(), own),
        ("size_exponent".to_string(), size),
        ("contributions_exponent".to_string(), contributions),
        ("nanoseconds_per_contribution_and_weight".to_string(), each),
    ]);
    for row in busy {
        let name = format!("{}_{}_contributions", row.preset, row.contributions);
        figures.insert(format!("{name}_cpu_seconds"), row.cost.together());
        figures.insert(format!("{name}_seconds"), row.cost.wall);
    }
    for row in idle.iter().filter(|row| row.idle > 0) {
        let Some(without) = idle.iter().find(|other| other.preset == row.preset && other.idle == 0) else { continue };
        let name = format!("{}_{}_idle", row.preset, row.idle);
        figures.insert(format!("{name}_cost_ratio"), row.cost.together() / without.cost.together());
        figures.insert(format!("{name}_microseconds_each"), 1e6 * per_idle_site(row, without));
    }
    figures
}
