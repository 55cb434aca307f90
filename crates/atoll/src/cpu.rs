//! The CPU as a device: what every build has.

use anyhow::Result;
use atoll_core::engine::Engine;
use atoll_cpu::{CpuEngine, Options, Precision, peak};
use atoll_node::site::Parts;

use crate::devices::{Device, Offer};
use crate::precision;

/// Some threads of this machine.
pub(crate) struct Cpu {
    threads: usize,
    precision: Precision,
    share: f64,
}

impl Cpu {
    /// That many threads, 0 for all cores, of whose time training takes `share`.
    pub(crate) fn new(threads: usize, precision: Precision, share: f64) -> Self {
        let threads = if threads == 0 { cores() } else { threads };
        Self { threads, precision, share }
    }

    /// All cores, measured, which takes some seconds.
    pub(crate) fn offer() -> Offer {
        let gflops = |precision| peak(precision, cores()) / 1e9;
        Offer {
            name: "cpu".to_string(),
            description: format!("{} cores, {}", cores(), instructions()),
            memory_bytes: memory_bytes(),
            f32_gflops: gflops(Precision::F32),
            bf16_gflops: Some(gflops(Precision::Bf16)),
        }
    }
}

impl Device for Cpu {
    fn engine_name(&self) -> &'static str {
        "cpu"
    }

    fn describe(&self) -> String {
        let (plural, precision) = (if self.threads == 1 { "" } else { "s" }, precision::name(self.precision));
        let device = format!("cpu, {precision}, {} thread{plural}", self.threads);
        if self.share < 1.0 { format!("{device} at {:.0} %", self.share * 100.0) } else { device }
    }

    fn threads(&self) -> usize {
        self.threads
    }

    fn engine(&self, parts: Parts) -> Result<Box<dyn Engine>> {
        let training = &parts.terms.config.training;
        let options = Options {
            model: parts.terms.model.clone(),
            optimizer: training.optimizer.clone(),
            muon: training.muon.clone(),
            precision: self.precision,
            rows: parts.rows,
            accumulate: training.accumulate,
            threads: self.threads,
        };
        let weights = parts.manifest.zeros();
        Ok(Box::new(CpuEngine::new(options, parts.manifest, weights, parts.feed)?))
    }
}

/// The engine with which a coordinator tries contributions: all cores, and as exact as can be.
pub(crate) fn judge(parts: Parts) -> Result<Box<dyn Engine>> {
    Cpu::new(0, Precision::F32, 1.0).engine(parts)
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// The widest instructions that the engine's kernels have use for.
fn instructions() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    {
        if Precision::best() == Precision::Bf16 {
            return "AVX-512 with bf16";
        }
        if is_x86_feature_detected!("avx512f") {
            return "AVX-512";
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            return "AVX2";
        }
    }
    "plain loops"
}

/// All memory, where the system tells it in a file.
fn memory_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let kib = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?.trim().strip_suffix(" kB")?;
    kib.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_told_in_a_few_words() {
        assert_eq!(Cpu::new(1, Precision::F32, 1.0).describe(), "cpu, f32, 1 thread");
        assert_eq!(Cpu::new(8, Precision::Bf16, 0.25).describe(), "cpu, bf16, 8 threads at 25 %");
    }
}
