//! What a site can train on: the CPU in every build, and what a build adds to it; `atoll devices` lists both.

use anyhow::{Result, bail};
use atoll_core::engine::Engine;
use atoll_node::site::Parts;
use serde::Serialize;

use crate::cpu::Cpu;
use crate::precision::Wish;

/// Devices that a build has beside the CPU.
pub trait Devices {
    /// All that this machine has, measured: seconds for each.
    fn list(&self) -> Listing;

    /// The device of that name, such as `vulkan:0`.
    ///
    /// # Errors
    /// With a hint, if there is none of that name here or it cannot multiply in the precision wished for.
    fn open(&self, name: &str, wish: Wish) -> Result<Box<dyn Device>>;
}

/// Something that a site trains on.
pub trait Device {
    /// Whose passes train on it, such as `burn`.
    fn engine_name(&self) -> &'static str;

    /// For people: its name, and what it multiplies in.
    fn describe(&self) -> String;

    /// Threads of the CPU that training keeps busy.
    fn threads(&self) -> usize;

    /// An engine on it, with weights of zero.
    ///
    /// # Errors
    /// If the device fails or cannot train with these settings.
    fn engine(&self, parts: Parts) -> Result<Box<dyn Engine>>;
}

/// What a machine has.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Listing {
    /// Devices.
    pub devices: Vec<Offer>,
    /// Why there may be more: sentences, each perhaps with a hint.
    pub problems: Vec<String>,
}

/// A device, measured.
#[derive(Debug, Clone, Serialize)]
pub struct Offer {
    /// As `atoll join --device` wants it.
    pub name: String,
    /// What it is.
    pub description: String,
    /// Its memory, if the system tells.
    pub memory_bytes: Option<u64>,
    /// Billions of multiply-adds per second in matrix products, counted as two operations each.
    pub f32_gflops: f64,
    /// The same with factors in bf16, if it multiplies them.
    pub bf16_gflops: Option<f64>,
}

/// No devices beside the CPU: the default build.
#[derive(Debug, Clone, Copy, Default)]
pub struct OnlyCpu;

/// The names under which another build may have GPUs.
const GPUS: [&str; 5] = ["vulkan", "metal", "cuda", "rocm", "wgpu"];

impl Devices for OnlyCpu {
    fn list(&self) -> Listing {
        let [most, rest] = ["vulkan".to_string(), GPUS[1..].join(", ")];
        let problem = format!(
            "GPUs are not in this build\n\
             hint: cargo install --path gpu/command --features {most} (or {rest})"
        );
        Listing { devices: Vec::new(), problems: vec![problem] }
    }

    fn open(&self, name: &str, _: Wish) -> Result<Box<dyn Device>> {
        let api = name.split(':').next().unwrap_or(name);
        if GPUS.contains(&api) {
            bail!("'{name}' is not in this build\nhint: cargo install --path gpu/command --features {api}");
        }
        bail!("there is no device '{name}' here\nhint: this build knows: cpu");
    }
}

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(arguments: &Arguments, devices: &dyn Devices) -> Result<()> {
    let mut listing = devices.list();
    listing.devices.insert(0, Cpu::offer());
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&listing)?);
        return Ok(());
    }
    println!("{:10} {:44} {:>10} {:>15} {:>15}", "device", "what it is", "memory", "f32 products", "bf16 products");
    listing.devices.iter().for_each(|offer| println!("{}", line(offer)));
    listing.problems.iter().for_each(|problem| println!("\n{problem}"));
    Ok(())
}

fn line(offer: &Offer) -> String {
    let memory = offer.memory_bytes.map_or("unknown".to_string(), |bytes| format!("{:.1} GiB", bytes as f64 / GIB));
    let rate = |gflops: f64| format!("{gflops:.0} GFLOP/s");
    let bf16 = offer.bf16_gflops.map_or("no".to_string(), rate);
    let Offer { name, description, f32_gflops, .. } = offer;
    format!("{name:10} {description:44} {memory:>10} {:>15} {bf16:>15}", rate(*f32_gflops))
}

const GIB: f64 = (1u64 << 30) as f64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_tells_memory_and_rates_or_that_they_are_unknown() {
        let offer = Offer {
            name: "wgpu:0".to_string(),
            description: "llvmpipe".to_string(),
            memory_bytes: None,
            f32_gflops: 12.4,
            bf16_gflops: None,
        };
        let words = |offer: &Offer| line(offer).split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!(words(&offer), "wgpu:0 llvmpipe unknown 12 GFLOP/s no");
        let offer = Offer { memory_bytes: Some(24 << 30), bf16_gflops: Some(25.0), ..offer };
        assert_eq!(words(&offer), "wgpu:0 llvmpipe 24.0 GiB 12 GFLOP/s 25 GFLOP/s");
    }

    #[test]
    fn a_gpu_that_was_not_built_in_is_named_with_its_feature() {
        let refusal = |name| OnlyCpu.open(name, Wish::Auto).err().map(|error| error.to_string());
        let hint = "'cuda:1' is not in this build\nhint: cargo install --path gpu/command --features cuda";
        assert_eq!(refusal("cuda:1").as_deref(), Some(hint));
        assert_eq!(refusal("abacus").as_deref(), Some("there is no device 'abacus' here\nhint: this build knows: cpu"));
    }
}
