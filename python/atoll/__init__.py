"""Atoll trains one language model across several data centers. This package is a site of a run inside a PyTorch process.

    import atoll

    engine = atoll.TorchEngine(atoll.Llama, device="cuda:0")     # Atoll drives
    atoll.join("atoll1.…", engine, data="texts/")

    with atoll.Site("atoll1.…", model, optimizer, data="texts/") as site:    # you drive
        for tokens in site.batches():
            ...                                                  # forward, backward, optimizer.step()
            site.after_step(tokens=tokens[:, 1:].numel(), loss=loss)

A ticket comes from `atoll ticket RUN SITE`, at the coordinator.
"""

import os

# PyTorch 2.5 and later would import every installed plug-in with itself, and fail where one has no driver.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

from ._atoll import AtollError, Batch, Batches, NativeEngine, NonFinite, Starved, __version__
from .run import Run, Tensor
from .site import Site, join

__all__ = [
    "AtollCallback", "AtollError", "Batch", "Batches", "Llama", "NativeEngine", "NonFinite", "Run", "Site", "Starved",
    "Tensor", "TorchEngine", "__version__", "join",
]

# What needs PyTorch is imported when it is asked for.
_LATER = {"TorchEngine": "engine", "Llama": "llama", "AtollCallback": "trainer"}


def __getattr__(name):
    if name not in _LATER:
        raise AttributeError(f"module 'atoll' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(f".{_LATER[name]}", __name__), name)
