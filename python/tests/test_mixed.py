"""One run on two and on three frameworks: as good as the same run on one."""

import os
from pathlib import Path

import atoll
import pytest
import torch

from conftest import ROOT

TOKENS = 1_500_000
CHANGES = [("evaluate_seconds = 30.0", "evaluate_seconds = 1.0"), ('up = "auto"', 'up = "bf16"'), ('down = "auto"', 'down = "bf16"')]


def held_out(lab, sites):
    """Held-out bits per byte at the end, after a look at every commit's digests."""
    report = lab.report()
    assert report["state"] == "finished" and len(report["sites"]) == sites
    for site in report["sites"]:
        assert site["contributions"] > 0 and site["digest_mismatches"] == 0, site
    assert "all digests equal" in lab.atoll("replay", lab.run)
    return report["bits_per_byte"]["last"]


def pair(lab, others):
    """Held-out losses of a run of native sites and of a mixed one: of one native site, one on PyTorch, and `others`, which are
    functions that start one."""
    native, mixed = lab(TOKENS, CHANGES), lab(TOKENS, CHANGES)
    names = ["one", "two", *(f"other{number}" for number in range(len(others)))]
    coordinator, processes = native.coordinate(), [native.join(name) for name in names]
    assert [process.wait() for process in [*processes, coordinator]] == [0] * (len(names) + 1)
    coordinator, processes = mixed.coordinate(), [mixed.join("one", "--share", "0.5")]
    processes += [start(mixed, name) for start, name in zip(others, names[2:])]
    torch.manual_seed(1)
    assert atoll.join(mixed.ticket("two"), atoll.TorchEngine(atoll.Llama), **mixed.options("two"))
    assert [process.wait() for process in [*processes, coordinator]] == [0] * len(names)
    losses = held_out(native, len(names)), held_out(mixed, len(names))
    print("native {:.4f}, mixed {:.4f}".format(*losses))
    return losses


def assert_as_good(lab, others):
    """Three mixed runs are in the mean within 0.5 % of the best of three native ones."""
    # Which site trains on how much depends on what else the machine does. On two idle cores of a Xeon six pairs were within
    # 0.26 %, and so were pairs of native runs within 0.20 %. On an EPYC 33 mixed runs were within 0.5 % of one another, but
    # of 33 native ones ten were 1 to 4 % worse than the others.
    native, mixed = zip(*(pair(lab, others) for _ in range(3)))
    gap = sum(mixed) / len(mixed) / min(native) - 1
    assert abs(gap) < 0.005, (native, mixed)


def test_held_out_loss_is_that_of_native_sites(lab):
    assert_as_good(lab, [])


def gpu_command():
    """The `atoll` that trains on GPUs: $ATOLL_GPU, or what was built in gpu/; none if there is none."""
    built = Path(os.environ.get("ATOLL_GPU", ROOT / "gpu/target/release/atoll"))
    return built if built.exists() else None


@pytest.mark.skipif(not gpu_command(), reason="no atoll with GPUs: `cargo build --release` in gpu/, or name one in $ATOLL_GPU")
def test_so_it_is_with_a_site_on_a_gpu_without_python(lab):
    device = os.environ.get("ATOLL_GPU_DEVICE", "wgpu")
    on_gpu = lambda lab, name: lab.join(name, "--device", device, command=gpu_command())
    assert_as_good(lab, [on_gpu])
