"""You drive: a training loop of one's own with three lines added."""

import signal
import subprocess
import sys

import atoll
import pytest
import torch
from torch.nn import functional


def loss_of(model, tokens):
    return functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def model_of(lab):
    torch.manual_seed(1)
    return atoll.Llama(lab.shape())


def test_three_lines_join_a_loop_to_a_run(lab):
    lab = lab(40_000)
    coordinator, native = lab.coordinate(), lab.join("native")
    model = model_of(lab)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    site = atoll.Site(lab.ticket("mine"), model, optimizer, **lab.options("mine"))
    steps = 0
    for tokens in site.batches():
        loss = loss_of(model, tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        site.after_step(tokens=tokens[:, 1:].numel(), loss=loss)
        steps += 1
    assert site.finished and coordinator.wait() == 0 and native.wait() == 0
    mine = next(site for site in lab.report()["sites"] if site["name"] == "mine")
    assert mine["contributions"] > 0 and mine["digest_mismatches"] == 0
    assert 0 < mine["steps"] <= steps
    assert "all digests equal" in lab.atoll("replay", lab.run)


def test_a_model_can_be_built_from_the_run(lab):
    lab = lab(20_000)
    lab.coordinate()
    with atoll.Site(lab.ticket("mine"), atoll.Llama, **lab.options("mine")) as site:
        assert site.model.config == lab.shape() and site.optimizer.steps == 0


def test_own_batches_use_up_as_many_leases(lab):
    lab = lab(20_000)
    coordinator = lab.coordinate()
    model = model_of(lab)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    with atoll.Site(lab.ticket("mine"), model, optimizer, own_batches=True, **lab.options("mine")) as site:
        while site.training:
            tokens = torch.randint(0, 300, (4, 33))
            loss = loss_of(model, tokens)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            site.after_step(tokens=4 * 32, loss=loss)
    assert site.finished and coordinator.wait() == 0
    assert lab.report()["tokens"] >= 20_000


def test_leaving_is_told_and_the_same_call_comes_back(lab):
    lab = lab(60_000)
    coordinator, native = lab.coordinate(), lab.join("native", "--share", "0.2")
    model, ticket = model_of(lab), lab.ticket("mine")
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    with atoll.Site(ticket, model, optimizer, **lab.options("mine")) as site:
        next(site.batches())
    assert not site.finished
    with pytest.raises(atoll.AtollError, match="not in its run any more"):
        site.after_step(tokens=1)
    assert atoll.join(ticket, atoll.TorchEngine(model, optimizer), **lab.options("mine"))
    assert coordinator.wait() == 0 and native.wait() == 0


ENDS = """
import sys, atoll
ticket, data, folder = sys.argv[1:]
site = atoll.Site(ticket, atoll.Llama, data=data, dir=folder)
for _, tokens in zip(range(5), site.batches()):
    site.after_step(tokens=tokens[:, 1:].numel())
    print("stepped", flush=True)
"""

JOINS = """
import sys, atoll
ticket, data, folder = sys.argv[1:]
class Talking(atoll.TorchEngine):
    def step(self, batch):
        print("stepped", flush=True)
        return super().step(batch)
print("finished", atoll.join(ticket, Talking(atoll.Llama), data=data, dir=folder))
"""


def process(lab, code):
    # Who starts tests in the background of a shell has them ignore SIGINT, and what is ignored on purpose stays so.
    heeding = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n" + code
    command = [sys.executable, "-c", heeding, lab.ticket("mine"), str(lab.text), str(lab.folder / "mine")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_script_that_just_ends_has_left(lab):
    lab = lab(10_000_000)
    lab.coordinate()
    script = process(lab, ENDS)
    said, _ = script.communicate(timeout=60)
    assert script.returncode == 0 and said == "stepped\n" * 5
    lab.until("the site to be away", lambda: lab.state("mine") == "away")


def test_control_c_leaves_after_the_step(lab):
    lab = lab(10_000_000)
    lab.coordinate()
    script = process(lab, JOINS)
    assert script.stdout.readline() == "stepped\n"
    script.send_signal(signal.SIGINT)
    said, _ = script.communicate(timeout=60)
    assert script.returncode == 0 and said.endswith("finished False\n")
