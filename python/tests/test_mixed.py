"""One run on two frameworks: as good as the same run on one."""

import atoll
import pytest
import torch

TOKENS = 1_500_000
CHANGES = [("evaluate_seconds = 30.0", "evaluate_seconds = 1.0"), ('up = "sparse:96"', 'up = "bf16"'), ('down = "sparse:224"', 'down = "bf16"')]


def held_out(lab):
    """Held-out bits per byte at the end, after a look at every commit's digests."""
    report = lab.report()
    assert report["state"] == "finished" and len(report["sites"]) == 2
    for site in report["sites"]:
        assert site["contributions"] > 0 and site["digest_mismatches"] == 0, site
    assert "all digests equal" in lab.atoll("replay", lab.run)
    return report["bits_per_byte"]["last"]


def gap(lab):
    """How much higher a mixed run's held-out loss is than that of native sites, as a share."""
    native, mixed = lab(TOKENS, CHANGES), lab(TOKENS, CHANGES)
    coordinator, processes = native.coordinate(), [native.join("one"), native.join("two")]
    assert [process.wait() for process in [*processes, coordinator]] == [0, 0, 0]
    coordinator, one = mixed.coordinate(), mixed.join("one", "--share", "0.5")
    torch.manual_seed(1)
    assert atoll.join(mixed.ticket("two"), atoll.TorchEngine(atoll.Llama), **mixed.options("two"))
    assert one.wait() == 0 and coordinator.wait() == 0
    alike, same = held_out(mixed), held_out(native)
    print(f"native {same:.4f}, mixed {alike:.4f}: {100 * (alike / same - 1):+.2f} %")
    return alike / same - 1


def test_held_out_loss_is_that_of_native_sites(lab):
    # Which site trains on how much depends on what else the machine does. On two idle cores six gaps were within 0.26 %,
    # and so were pairs of native runs within 0.20 %; beside builds one gap was 0.52 %. Hence the mean of three.
    gaps = [gap(lab) for _ in range(3)]
    assert abs(sum(gaps) / len(gaps)) < 0.005, gaps
