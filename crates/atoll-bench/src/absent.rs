//! What absent sites do to the model, when each site's data are different: toys in simulated worlds.

use atoll_core::round::{Absent, Sync};
use atoll_sim::{Absences, Attendance, absences};

use crate::{Figures, quantile};

/// A rule for absent sites by its name. A new rule is a new line.
const RULES: [(&str, Absent); 2] = [("ignore", Absent::Ignore), ("reserve", Absent::Reserve)];

const ATTENDANCES: [(&str, Attendance); 3] =
    [("constant", Attendance::Constant), ("patchy", Attendance::Patchy), ("sparse", Attendance::Sparse)];

pub(crate) fn run(quick: bool) -> Figures {
    let seeds = if quick { 40 } else { 400 };
    println!(
        "{seeds} worlds of four sites with different data; distance of the final model from the mean of their data\n"
    );
    println!("                        weighted by tokens            all sites alike");
    println!("attendance rule         median   90 %   large   |   median   90 %   large   broken");
    let mut figures = Figures::new();
    for (name, attendance) in ATTENDANCES {
        for (rule, absent) in RULES {
            let all = in_parallel(&Sync { absent, ..Sync::default() }, attendance, seeds);
            print_row(rule, name, &all);
            figures.insert(format!("{rule}_{name}_median"), quantile(all.by_tokens.clone(), 0.5));
            figures.insert(format!("{rule}_{name}_p90"), quantile(all.by_tokens.clone(), 0.9));
            figures.insert(format!("{rule}_{name}_large"), Absences::large(&all.by_tokens) as f64);
            figures.insert(format!("{rule}_{name}_even_median"), quantile(all.even.clone(), 0.5));
            figures.insert(format!("{rule}_{name}_broken"), all.broken.len() as f64);
        }
    }
    figures
}

fn print_row(rule: &str, attendance: &str, all: &Absences) {
    let cells = |errors: &[f64]| {
        let (median, most) = (quantile(errors.to_vec(), 0.5), quantile(errors.to_vec(), 0.9));
        format!("{median:6.4}   {most:.4}   {:5}", Absences::large(errors))
    };
    let broken = all.broken.len();
    println!("{attendance:10} {rule:10}   {}   |   {}   {broken:6}", cells(&all.by_tokens), cells(&all.even));
    all.broken.iter().take(3).for_each(|why| println!("  {why}"));
}

/// [`absences`] on all cores.
fn in_parallel(sync: &Sync, attendance: Attendance, seeds: u64) -> Absences {
    let workers = std::thread::available_parallelism().map_or(1, usize::from) as u64;
    let share = seeds.div_ceil(workers);
    std::thread::scope(|scope| {
        let ranges = (0..workers).map(|worker| worker * share..(worker * share + share).min(seeds));
        let threads: Vec<_> = ranges.map(|seeds| scope.spawn(move || absences(sync, attendance, seeds))).collect();
        threads.into_iter().fold(Absences::default(), |mut all, thread| {
            let part = thread.join().expect("a world that breaks says so and does not panic");
            all.by_tokens.extend(part.by_tokens);
            all.even.extend(part.even);
            all.broken.extend(part.broken);
            all
        })
    })
}
