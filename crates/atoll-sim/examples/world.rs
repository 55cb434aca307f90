//! Runs the world of a seed, hostile with `--hostile`: `cargo run -p atoll-sim --example world SEED`.
//! With `ATOLL_SIM_TRACE=1` in the environment everything that happens is printed.

use atoll_sim::{Hardships, simulate};

fn main() {
    let seed = std::env::args().nth(1).and_then(|seed| seed.parse().ok()).unwrap_or(0);
    let hostile = std::env::args().any(|argument| argument == "--hostile");
    let hardships = if hostile { Hardships::of(seed) } else { Hardships::NONE };
    println!("{:#?}", simulate(seed, hardships));
}
