//! Which devices Burn reaches from here, by what name a person asks for one, and how fast they multiply.
//!
//! A name is an interface and a number, such as `vulkan:0`; the interface alone is its first device. Which interfaces
//! there are is decided when the crate is built, by its features; the same card may be there under several.

use std::fs;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use burn::tensor::{Device as Handle, DeviceType, FloatDType, Tensor};

use crate::arithmetic::Precision;

/// An interface through which devices are reached: a feature of this crate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Api {
    /// Shaders in WebGPU's language over whatever the machine has.
    Wgpu,
    /// Any maker's cards, with Vulkan's own shaders.
    Vulkan,
    /// Apple's.
    Metal,
    /// NVIDIA's.
    Cuda,
    /// AMD's.
    Rocm,
}

impl Api {
    /// All of them, built in or not.
    pub const ALL: [Self; 5] = [Self::Wgpu, Self::Vulkan, Self::Metal, Self::Cuda, Self::Rocm];

    /// Its name, also as a feature.
    pub fn name(self) -> &'static str {
        match self {
            Self::Wgpu => "wgpu",
            Self::Vulkan => "vulkan",
            Self::Metal => "metal",
            Self::Cuda => "cuda",
            Self::Rocm => "rocm",
        }
    }

    /// Whether this build has it.
    pub fn is_built(self) -> bool {
        self.burns().is_some()
    }

    /// Burn's word for it, if this build has it.
    fn burns(self) -> Option<DeviceType> {
        match self {
            #[cfg(feature = "wgpu")]
            Self::Wgpu => Some(DeviceType::Wgpu),
            #[cfg(feature = "vulkan")]
            Self::Vulkan => Some(DeviceType::Vulkan),
            #[cfg(feature = "metal")]
            Self::Metal => Some(DeviceType::Metal),
            #[cfg(feature = "cuda")]
            Self::Cuda => Some(DeviceType::Cuda),
            #[cfg(feature = "rocm")]
            Self::Rocm => Some(DeviceType::Rocm),
            #[allow(unreachable_patterns, reason = "with all features nothing is left")]
            _ => None,
        }
    }
}

/// Widths of the squares that are multiplied to measure a device: the widest takes 64 MiB, and drivers refuse more
/// than 128 in one piece.
const SQUARES: Range<usize> = 256..4096;

/// A device that can train.
#[derive(Debug, Clone)]
pub struct Device {
    name: String,
    handle: Handle,
}

/// The devices that `api` reaches; none if this build does not have it.
///
/// # Errors
/// If the driver fails while it is asked.
pub fn devices(api: Api) -> Result<Vec<Device>, String> {
    let Some(kind) = api.burns() else { return Ok(Vec::new()) };
    let handles = guarded(api.name(), || Handle::enumerate(kind).to_vec())?;
    let named = |(index, handle)| Device { name: format!("{}:{index}", api.name()), handle };
    Ok(handles.into_iter().enumerate().map(named).collect())
}

/// Drivers and their bindings panic when something is missing; `what` names whom they failed.
fn guarded<T>(what: &str, ask: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(ask)).map_err(|panic| {
        let said = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        format!("{what} failed: {}", said.unwrap_or("its driver does not say why"))
    })
}

impl Device {
    /// The device of that name, such as `cuda:1`, or `cuda` for the first.
    ///
    /// # Errors
    /// In a sentence, with a hint: if there is no such interface, this build does not have it, or no such device is here.
    pub fn open(name: &str) -> Result<Self, String> {
        let (api, index) = name.split_once(':').unwrap_or((name, "0"));
        let names = Api::ALL.map(Api::name).join(", ");
        let api = Api::ALL.into_iter().find(|known| known.name() == api);
        let api = api.ok_or_else(|| format!("there is no device '{name}'\nhint: devices are cpu, {names}"))?;
        if !api.is_built() {
            let feature = api.name();
            return Err(format!(
                "'{name}' is not in this build\nhint: cargo install --path gpu/command --features {feature}"
            ));
        }
        let mut devices = devices(api)?;
        match index.parse::<usize>() {
            Ok(index) if index < devices.len() => Ok(devices.swap_remove(index)),
            _ => Err(format!(
                "there is no device '{name}': {} reaches {} here\nhint: `atoll devices` lists them",
                api.name(),
                devices.len()
            )),
        }
    }

    /// Its name, such as `vulkan:0`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What its driver calls it.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn description(&self) -> Result<String, String> {
        let identity = guarded(&self.name, || self.handle.identity())?;
        Ok(identity.map_or_else(|| self.name.clone(), |identity| identity.name))
    }

    /// Its own memory, where the system tells it: Linux does for AMD's cards.
    pub fn memory_bytes(&self) -> Option<u64> {
        let address = guarded(&self.name, || self.handle.identity()).ok()??.physical?.pci_address?;
        let text = fs::read_to_string(format!("/sys/bus/pci/devices/{address}/mem_info_vram_total")).ok()?;
        text.trim().parse().ok()
    }

    /// Whether its products may have such operands.
    pub fn multiplies(&self, precision: Precision) -> bool {
        match precision {
            Precision::F32 => true,
            Precision::Bf16 => self.handle.supports_dtype(FloatDType::BF16),
        }
    }

    /// Whether its products may have such operands.
    ///
    /// # Errors
    /// In a sentence, with a hint, if not.
    pub fn check(&self, precision: Precision) -> Result<(), String> {
        if self.multiplies(precision) {
            Ok(())
        } else {
            Err(format!("{} cannot multiply bf16\nhint: --precision f32", self.name))
        }
    }

    /// Multiply-adds per second in matrix products, counted as two operations each: of squares that grow until one
    /// product takes a twentieth of a second.
    ///
    /// # Errors
    /// If the driver fails, or its products are wrong.
    pub fn rate(&self, precision: Precision) -> Result<f64, String> {
        let mut size = SQUARES.start;
        loop {
            let seconds = guarded(&self.name, || self.product_seconds(precision, size))??;
            if seconds > 0.05 || size >= SQUARES.end {
                return Ok(2.0 * (size as f64).powi(3) / seconds);
            }
            size *= 2;
        }
    }

    /// The shortest of some products of squares.
    fn product_seconds(&self, precision: Precision, size: usize) -> Result<f64, String> {
        let square = Tensor::<2>::ones([size, size], &self.handle);
        let mut shortest = f64::INFINITY;
        // The first compiles kernels.
        for turn in 0..4 {
            let began = Instant::now();
            let product = precision.product(square.clone(), square.clone());
            // One number of it: it cannot be there before the product is.
            let last = product.narrow(0, size - 1, 1).narrow(1, size - 1, 1);
            let last: f32 = last.try_into_scalar().map_err(|error| format!("{} failed: {error}", self.name))?;
            if last != size as f32 {
                return Err(format!("{} multiplies wrongly: {last} is not {size}", self.name));
            }
            if turn > 0 {
                shortest = shortest.min(began.elapsed().as_secs_f64());
            }
        }
        Ok(shortest)
    }

    /// Burn's handle.
    pub(crate) fn handle(&self) -> &Handle {
        &self.handle
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_is_not_here_is_refused_with_a_hint() {
        let error = Device::open("abacus").unwrap_err();
        assert_eq!(error, "there is no device 'abacus'\nhint: devices are cpu, wgpu, vulkan, metal, cuda, rocm");
        if !Api::Rocm.is_built() {
            let error = Device::open("rocm:1").unwrap_err();
            assert!(error.starts_with("'rocm:1' is not in this build\nhint: "), "{error}");
            assert!(error.ends_with("--features rocm"), "{error}");
        }
        if Api::Wgpu.is_built() {
            for name in ["wgpu:99", "wgpu:x"] {
                let error = Device::open(name).unwrap_err();
                assert!(error.starts_with(&format!("there is no device '{name}': wgpu reaches ")), "{error}");
            }
        }
    }
}
