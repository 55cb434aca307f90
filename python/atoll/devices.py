"""Devices by name: `cpu`, `cuda:0` (NVIDIA and ROCm), `npu` (Ascend), `musa`, `mlu`, `xpu`, `mps`.

A vendor's plug-in is imported when its device is asked for, and never before: some of them hook `import torch`
itself, and fail it where their driver is missing.
"""

import importlib
from dataclasses import dataclass

import torch

from ._atoll import AtollError


@dataclass(frozen=True)
class Maker:
    """Who makes a kind of device, and what PyTorch needs for it."""

    name: str
    needs: str
    plugin: str = None


MAKERS = {
    "cpu": Maker("the processor", "nothing"),
    "cuda": Maker("NVIDIA or AMD", "a driver, and a PyTorch built for CUDA or ROCm"),
    "npu": Maker("Huawei Ascend", "the CANN toolkit (source its set_env.sh) and the Ascend driver", "torch_npu"),
    "musa": Maker("Moore Threads", "the MUSA toolkit and driver", "torch_musa"),
    "mlu": Maker("Cambricon", "the Neuware toolkit and driver", "torch_mlu"),
    "xpu": Maker("Intel", "Intel's GPU driver, and a PyTorch built for XPU or its extension"),
    "mps": Maker("Apple", "macOS on Apple silicon"),
}


def find(name):
    """The device of that name, if PyTorch can use it here."""
    kind = str(name).partition(":")[0]
    maker = MAKERS.get(kind)
    if maker is None:
        raise AtollError(f"there is no device '{name}'\nhint: Atoll knows {', '.join(MAKERS)}, with a number as in cuda:0")
    if maker.plugin is not None:
        load(kind, maker)
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise absent(name, maker, first_line(error)) from None
    if kind != "cpu":
        look(device, maker)
    return device


def load(kind, maker):
    """Imports a vendor's plug-in."""
    try:
        importlib.import_module(maker.plugin)
    except ModuleNotFoundError as error:
        if error.name != maker.plugin:
            raise absent(kind, maker, f"{maker.plugin} misses the Python module {error.name}") from None
        raise AtollError(
            f"the device '{kind}' ({maker.name}) needs the PyTorch plug-in {maker.plugin}, which is not installed\n"
            f"hint: pip install {maker.plugin}, in the version that belongs to torch {torch.__version__}; it also needs {maker.needs}"
        ) from None
    except Exception as error:  # A plug-in without its driver fails in many ways.
        raise absent(kind, maker, f"{maker.plugin} cannot be loaded: {first_line(error)}") from None


def look(device, maker):
    """Puts one number on the device."""
    try:
        torch.zeros(1, device=device)
    except Exception as error:  # What PyTorch raises differs from vendor to vendor: AssertionError, RuntimeError ...
        raise absent(device, maker, first_line(error)) from None


def absent(name, maker, why):
    version = f"; {maker.plugin} must be the version that belongs to torch {torch.__version__}" if maker.plugin else ""
    return AtollError(f"the device '{name}' ({maker.name}) cannot be used here: {why}\nhint: it needs {maker.needs}{version}")


def first_line(error):
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def host_memory(length, device):
    """A float32 tensor in the host's memory, pinned where the device copies faster from such memory."""
    if device.type in ("cpu", "mps"):
        return torch.empty(length, dtype=torch.float32)
    try:
        return torch.empty(length, dtype=torch.float32, pin_memory=True)
    except (RuntimeError, NotImplementedError):  # This vendor's PyTorch pins nothing.
        return torch.empty(length, dtype=torch.float32)


def wait(device):
    """Waits until copies to the host have arrived."""
    module = getattr(torch, device.type, None)
    if device.type != "cpu" and hasattr(module, "synchronize"):
        module.synchronize()


def is_out_of_memory(error):
    return isinstance(error, MemoryError) or "out of memory" in str(error).lower() or "can't allocate" in str(error)
