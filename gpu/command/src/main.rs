//! The command `atoll` with GPUs: the same subcommands, and the devices that Burn reaches.

use std::process::ExitCode;

use anyhow::{Result, anyhow};
use atoll::{Device, Devices, Listing, Offer, Wish};
use atoll_burn::{Api, BurnEngine, Options, Precision, devices};
use atoll_core::engine::Engine;
use atoll_node::site::Parts;

fn main() -> ExitCode {
    atoll::run(&Gpus)
}

/// The devices of all interfaces that this build has.
struct Gpus;

impl Devices for Gpus {
    fn list(&self) -> Listing {
        let mut listing = Listing::default();
        for api in Api::ALL.into_iter().filter(|api| api.is_built()) {
            let found = devices(api).unwrap_or_else(|problem| {
                listing.problems.push(problem);
                Vec::new()
            });
            if found.is_empty() {
                listing.problems.push(format!("{} reaches no device here\nhint: is its driver installed?", api.name()));
            }
            for device in found {
                match offer(&device) {
                    Ok(offer) => listing.devices.push(offer),
                    Err(problem) => listing.problems.push(problem),
                }
            }
        }
        listing
    }

    fn open(&self, name: &str, wish: Wish) -> Result<Box<dyn Device>> {
        let device = atoll_burn::Device::open(name).map_err(|sentence| anyhow!(sentence))?;
        let precision = match wish {
            Wish::Auto | Wish::F32 => Precision::F32,
            Wish::Bf16 => Precision::Bf16,
        };
        device.check(precision).map_err(|sentence| anyhow!(sentence))?;
        Ok(Box::new(Gpu { device, precision }))
    }
}

fn offer(device: &atoll_burn::Device) -> Result<Offer, String> {
    let gflops = |precision| device.rate(precision).map(|rate| rate / 1e9);
    Ok(Offer {
        name: device.name().to_string(),
        description: device.description()?,
        memory_bytes: device.memory_bytes(),
        f32_gflops: gflops(Precision::F32)?,
        bf16_gflops: device.multiplies(Precision::Bf16).then(|| gflops(Precision::Bf16)).transpose()?,
    })
}

/// A device of Burn's that a site trains on.
struct Gpu {
    device: atoll_burn::Device,
    precision: Precision,
}

impl Device for Gpu {
    fn engine_name(&self) -> &'static str {
        "burn"
    }

    fn describe(&self) -> String {
        let precision = match self.precision {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
        };
        let maker = self.device.description().unwrap_or_else(|problem| problem);
        format!("{}, {precision}, {maker}", self.device.name())
    }

    /// One hands out kernels.
    fn threads(&self) -> usize {
        1
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
        };
        let weights = parts.manifest.zeros();
        Ok(Box::new(BurnEngine::new(options, self.device.clone(), parts.manifest, &weights, parts.feed)?))
    }
}
