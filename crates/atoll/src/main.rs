//! The command `atoll` as it is built by default: it trains on the CPU.

use std::process::ExitCode;

fn main() -> ExitCode {
    atoll::run(&atoll::OnlyCpu)
}
