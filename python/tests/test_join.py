"""Atoll drives: a PyTorch site and a native one in a real run, over TLS."""

import atoll
import pytest
import torch


def test_a_torch_site_and_a_native_one_hold_the_same_model(lab):
    lab = lab(60_000)
    coordinator = lab.coordinate()
    native = lab.join("native")
    torch.manual_seed(1)
    finished = atoll.join(lab.ticket("torch"), atoll.TorchEngine(atoll.Llama), **lab.options("torch"))
    assert finished
    assert coordinator.wait() == 0 and native.wait() == 0, lab.log("coordinator")
    report = lab.report()
    assert report["state"] == "finished" and report["tokens"] >= 60_000
    sites = {site["name"]: site for site in report["sites"]}
    assert set(sites) == {"native", "torch"}
    for name, site in sites.items():
        assert site["contributions"] > 0 and site["digest_mismatches"] == 0, (name, site)
    assert sites["torch"]["engine"] == "torch" and "fp32" in sites["torch"]["device"]
    assert report["bits_per_byte"]["last"] < report["bits_per_byte"]["first"]
    assert "all digests equal" in lab.atoll("replay", lab.run)
