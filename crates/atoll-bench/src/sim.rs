//! Many simulated worlds.

use atoll_sim::{Hardships, simulate};

use crate::Figures;

/// Seeds start here, away from those of the tests.
const FIRST_SEED: u64 = 1_000_000;

pub(crate) fn run(quick: bool) -> Figures {
    let seeds: u64 = if quick { 500 } else { 10_000 };
    let workers = std::thread::available_parallelism().map_or(1, usize::from) as u64;
    let worker = |first: u64| {
        let mine = (first..seeds).step_by(workers as usize).map(|seed| FIRST_SEED + seed);
        mine.filter_map(|seed| simulate(seed, Hardships::of(seed)).err()).collect::<Vec<String>>()
    };
    let broken: Vec<String> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..workers).map(|first| scope.spawn(move || worker(first))).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap_or_default()).collect()
    });
    println!("{seeds} hostile worlds from seed {FIRST_SEED}: {} broke an invariant", broken.len());
    broken.iter().for_each(|world| println!("  {world}"));
    Figures::from([("seeds".to_string(), seeds as f64), ("failures".to_string(), broken.len() as f64)])
}
