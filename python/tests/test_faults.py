"""What goes wrong in an engine is one clear sentence; the site leaves, its leases return, the others go on."""

import json
import signal
import sys

import atoll
import pytest
import torch


def test_an_exception_in_training_leaves_the_run_and_the_others_finish_it(lab):
    lab = lab(120_000)  # A fast native site is not to be done with all of it before the other one has begun.
    coordinator, native = lab.coordinate(), lab.join("native")

    class Breaking(atoll.TorchEngine):
        def step(self, batch):
            if self.steps == 3:
                raise ValueError("the loader has no such shard\nwith details")
            return super().step(batch)

    with pytest.raises(atoll.AtollError) as left:
        atoll.join(lab.ticket("torch"), Breaking(atoll.Llama), **lab.options("torch"))
    said = str(left.value)
    assert "training stopped; " in said and "the run goes on without this site" in said
    assert "the engine's train() raised ValueError: the loader has no such shard\nhint: " in said
    assert isinstance(left.value.__cause__, ValueError)
    assert coordinator.wait() == 0 and native.wait() == 0
    report = lab.report()
    assert report["state"] == "finished"
    torch_site = next(site for site in report["sites"] if site["name"] == "torch")
    assert torch_site["state"] == "away", torch_site


RUINS = """
import sys, atoll, torch
class Ruining(atoll.TorchEngine):
    def step(self, batch):
        loss = super().step(batch)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter *= 0.9
        return loss
ticket, data, folder = sys.argv[1:]
atoll.join(ticket, Ruining(atoll.Llama), data=data, dir=folder)
"""


def test_a_site_that_ruins_what_it_learns_loses_its_weight_where_contributions_are_tried(lab):
    """Of two sites neither is a majority: only the coordinator's own text can tell which of them does harm."""
    tries = ("[coordinator]\n", '[coordinator]\ntrial_text = "../text"\n')
    lab = lab(1_000_000_000, [tries, ("learning_rate = 1.5e-3", "learning_rate = 1e-4")])  # Slow: there is always some to ruin.
    coordinator, native = lab.coordinate(), lab.join("native")
    lab.spawn("torch", [sys.executable, "-c", RUINS, lab.ticket("torch"), lab.text, lab.folder / "torch"])

    def harmful():
        events = map(json.loads, (lab.run / "events.jsonl").read_text().splitlines())
        return {event["site"] for event in events if event["event"] == "guarded" and event["why"] == "harmful"}

    lab.until("something to happen", (lab.run / "events.jsonl").exists)
    lab.until("the site to lose its weight", harmful)
    assert harmful() == {"torch"}
    coordinator.send_signal(signal.SIGTERM)
    assert coordinator.wait(60) == 0
    sites = {site["name"]: site for site in lab.report()["sites"]}
    assert sites["torch"]["quality"] < -0.25 and sites["native"]["quality"] > 0, sites
    assert "all digests equal" in lab.atoll("replay", lab.run)


def test_no_memory_is_a_sentence_of_the_run(lab):
    lab = lab(60_000)
    lab.coordinate()

    class Full(atoll.TorchEngine):
        def backward(self, batch, scale):
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB (GPU 0; 79 GiB total capacity)")

    with pytest.raises(atoll.AtollError, match="cpu is out of memory for a step of 2 rows of 32 tokens\nhint: "):
        atoll.join(lab.ticket("torch"), Full(atoll.Llama), **lab.options("torch"))


def test_a_model_that_is_not_the_runs_never_joins(lab):
    lab = lab(60_000)
    lab.coordinate()
    wrong = lambda shape: atoll.Llama(shape | {"intermediate_size": 48})
    with pytest.raises(atoll.AtollError, match="mlp.gate_proj.weight has the shape .48, 32., expected .64, 32."):
        atoll.join(lab.ticket("torch"), atoll.TorchEngine(wrong), **lab.options("torch"))


def test_tokens_of_another_tokenizer_are_refused(lab):
    lab = lab(60_000)
    lab.write_text(lab.folder / "few", 6)
    lab.atoll("new", lab.folder / "run2", "--data", lab.folder / "few", "--vocab", 280, "--preset", "nano", "--tokens", 1000)
    lab.atoll("ingest", lab.text, "--run", lab.folder / "run2", "--out", lab.folder / "tokens")
    lab.coordinate()
    with pytest.raises(atoll.AtollError, match="tokenizer"):
        atoll.join(lab.ticket("torch"), atoll.TorchEngine(atoll.Llama), data=lab.folder / "tokens", dir=lab.folder / "t")


def test_a_ticket_that_is_none_is_said_to_be_none(tmp_path):
    with pytest.raises(atoll.AtollError, match="neither a ticket nor a file with one"):
        atoll.join(tmp_path / "absent", atoll.TorchEngine(atoll.Llama))
    with pytest.raises(atoll.AtollError, match="cut short\nhint: copy the whole line"):
        atoll.join("atoll1.abc", atoll.TorchEngine(atoll.Llama))


def test_own_batches_that_end_are_said_to_end(lab):
    lab = lab(60_000)
    lab.coordinate()
    few = [torch.randint(0, 300, (4, 33)) for _ in range(3)]
    with pytest.raises(atoll.AtollError, match="your batches have come to an end before the run"):
        atoll.join(lab.ticket("torch"), atoll.TorchEngine(atoll.Llama, batches=few), **lab.options("torch"))


def test_a_gradient_that_is_not_finite_leaves_the_run_and_names_its_tensor(lab):
    lab = lab(60_000)
    coordinator, native = lab.coordinate(), lab.join("native")

    class Exploding(atoll.TorchEngine):
        def backward(self, batch, scale):
            nats = super().backward(batch, scale)
            if self.steps == 3:
                self.weights.parameters["model.norm.weight"].grad[0] = float("nan")
            return nats

    with pytest.raises(atoll.AtollError) as left:
        atoll.join(lab.ticket("torch"), Exploding(atoll.Llama), **lab.options("torch"))
    assert "the gradient of model.norm.weight became non-finite at inner step 4\nhint: " in str(left.value)
    assert coordinator.wait() == 0 and native.wait() == 0
    report = lab.report()
    assert report["state"] == "finished" and all(site["digest_mismatches"] == 0 for site in report["sites"])


def test_an_exception_at_joining_is_a_sentence_and_the_others_go_on(lab):
    lab = lab(20_000)
    coordinator, native = lab.coordinate(), lab.join("native")

    def build(shape):
        raise KeyError("no such layer\nwith details")

    with pytest.raises(atoll.AtollError, match="the engine's open.. raised KeyError: .*no such layer.*\nhint: "):
        atoll.join(lab.ticket("torch"), atoll.TorchEngine(build), **lab.options("torch"))
    assert coordinator.wait() == 0 and native.wait() == 0
