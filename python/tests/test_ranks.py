"""Several ranks are one site: DDP and FSDP2 over Gloo, beside a native site in a real run."""

import os
import signal
import socket
import subprocess
import sys

import atoll
import pytest
import torch

CODE = """
import os, sys, atoll, torch
ticket, data, folder, parallel, rows = sys.argv[1:]
torch.manual_seed(int(os.environ["RANK"]))
class Talking(atoll.TorchEngine):
    def step(self, batch):
        if self.steps == 5:
            print("trains", flush=True)
        return super().step(batch)
engine = Talking(atoll.Llama, parallel=parallel)
print("finished", atoll.join(ticket, engine, data=data, dir=folder, rows=int(rows)))
"""

# Rank 0 fails within its ninth step, which rank 1 has begun.
FAILS = CODE.replace("        return super", """        if self.steps == 8 and self.ranks.rank == 0:
            raise ValueError("the first rank has a bad day")
        return super""")

DRIVES = """
import sys, weakref, atoll, torch
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
ticket, data, folder, _, rows = sys.argv[1:]
torch.distributed.init_process_group("gloo")
model = DistributedDataParallel(atoll.Llama(eval(open(folder + ".shape").read())))
optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
site = atoll.Site(ticket, model, optimizer, data=data, dir=folder, rows=int(rows))
group = weakref.ref(site.engine.ranks.group)
for tokens in site.batches():
    loss = functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    optimizer.zero_grad(); loss.backward(); optimizer.step()
    site.after_step(tokens=tokens[:, 1:].numel(), loss=loss)
    print("trains", flush=True)
assert group() is None, "Gloo's threads would outlive the interpreter, and abort the process now and then"
print("finished", site.finished)
"""

try:
    from torch.distributed.device_mesh import init_device_mesh  # First: old FSDP cannot be imported by every Python.
    from torch.distributed.fsdp import fully_shard
except ImportError:
    init_device_mesh = fully_shard = None
needs_fsdp2 = pytest.mark.skipif(
    fully_shard is None, reason=f"SKIPPED: needs torch >= 2 (FSDP2: 2.6), and this is {torch.__version__}"
)
PARALLEL = ["ddp", pytest.param("fsdp", marks=needs_fsdp2)]


TRAINS = """
import sys; sys.path.insert(0, sys.argv[1])
import atoll, conftest, json, numpy, torch
from atoll import _atoll, ranks
golden, parallel = conftest.Golden(sys.argv[2]), sys.argv[3]
training = json.loads(golden.training) | dict(rows=2, accumulate=2)
training["optimizer"] |= dict(embedding_rate=8.0, embedding_floor=1.0 if golden.numbers["model"]["tie_word_embeddings"] else 0.0)
run = _atoll.describe(golden.model, json.dumps(training), golden.FRAGMENTS)
batches = [numpy.concatenate([batch, batch[::-1]])[:4] for batch in golden.batches()]

def trained(**options):
    engine = atoll.TorchEngine(atoll.Llama, **options)
    feed = atoll.Batches.of(batches) if engine.ranks.rank == 0 else None
    engine.open(run, feed)
    layout, first = ranks.layout(engine) if engine.ranks.size > 1 else engine, engine.ranks.rank == 0
    for fragment, part in enumerate(golden.weights(engine.run)):
        layout.write(fragment, part if first else None)
        layout.add(fragment, numpy.full_like(part, 1e-3) if first else None)
    losses = [engine.train(1)[1] for _ in batches]
    nats = engine.evaluate(atoll.Batches.of([batches[0][:3]]).next(1) if first else None)
    weights = [numpy.zeros_like(part) for part in golden.weights(engine.run)]
    for fragment, part in enumerate(weights):
        layout.read(fragment, part if first else None)
    if engine.ranks.size > 1:  # As another life of the site would.
        engine.ranks.part()
        engine.ranks.meet()
        assert engine.ranks.share(7) == 7
    return engine.ranks.rank, [*losses, nats], weights

rank, losses, weights = trained(parallel=parallel)
ranks.here = lambda device: ranks.Alone()
_, alone_losses, alone_weights = trained()
assert numpy.allclose(losses, alone_losses, rtol=2e-6), (losses, alone_losses)
if rank == 0:
    for ours, theirs in zip(weights, alone_weights):
        assert abs(ours - theirs).max() < 2e-5, abs(ours - theirs).max()
"""


def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def ranks(lab, parallel, code=CODE, rows=4, ticket=None):
    """The two processes of a site."""
    folder = lab.folder / "ranks"
    lab.processes += (processes := started(lab.folder, [code, ticket or lab.ticket("ranks"), lab.text, folder, parallel, rows]))
    return processes


def started(folder, arguments, count=2):
    """Ranks as torchrun starts them."""
    arguments = [sys.executable, "-c", *arguments]
    several = dict(WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=port(), OMP_NUM_THREADS="1")
    processes = []
    for rank in range(count):
        log = open(folder / f"rank{rank}.log", "w")
        environment = os.environ | several | dict(RANK=str(rank), LOCAL_RANK=str(rank))
        processes.append(subprocess.Popen(list(map(str, arguments)), env=environment, stdout=log, stderr=log))
    return processes


def said_by(lab, rank):
    """What a rank has said; newer PyTorch puts its number before each line."""
    return lab.log(f"rank{rank}").replace(f"[rank{rank}]: ", "")


def logs(lab):
    return "\n".join(f"rank {rank}: " + said_by(lab, rank) for rank in range(2))


def joined_later(lab):
    """A native site that waits for PyTorch to be imported; it would be done before."""
    lab.until("the ranks to train", lambda: "trains" in said_by(lab, 1))
    return lab.join("native")


def check(lab):
    """Both sites contributed and held the same model at every commit, which can be computed again."""
    report = lab.report()
    sites = {site["name"]: site for site in report["sites"]}
    assert report["state"] == "finished" and set(sites) == {"native", "ranks"}
    for name, site in sites.items():
        assert site["contributions"] > 0 and site["digest_mismatches"] == 0, (name, site)
    assert report["bits_per_byte"]["last"] < 0.8 * report["bits_per_byte"]["first"]
    assert "all digests equal" in lab.atoll("replay", lab.run)
    return sites


@pytest.mark.parametrize("parallel", PARALLEL)
@pytest.mark.parametrize("name", ["tied", "untied", "muon"])
def test_two_ranks_compute_what_one_process_does(tmp_path, name, parallel):
    processes = started(tmp_path, [TRAINS, os.path.dirname(__file__), name, parallel])
    codes = [process.wait(120) for process in processes]
    assert codes == [0, 0], (tmp_path / "rank0.log").read_text() + (tmp_path / "rank1.log").read_text()


@pytest.mark.parametrize("parallel", PARALLEL)
def test_two_ranks_and_a_native_site_hold_the_same_model(lab, parallel):
    lab = lab(100_000)
    coordinator = lab.coordinate()
    processes, native = ranks(lab, parallel), joined_later(lab)
    for process in processes:
        assert process.wait(120) == 0, logs(lab)
    assert coordinator.wait() == 0 and native.wait() == 0
    sites = check(lab)
    assert "2 × cpu" in sites["ranks"]["device"]
    assert said_by(lab, 0).endswith("finished True\n") and said_by(lab, 1).endswith("finished True\n"), logs(lab)


def test_a_loop_of_ones_own_runs_on_every_rank(lab):
    lab = lab(100_000)
    (lab.folder / "ranks.shape").write_text(repr(lab.shape()))
    coordinator = lab.coordinate()
    processes, native = ranks(lab, "own", DRIVES), joined_later(lab)
    for process in processes:
        assert process.wait(120) == 0, logs(lab)
    assert coordinator.wait() == 0 and native.wait() == 0
    check(lab)


@pytest.mark.parametrize("parallel", PARALLEL)
def test_a_rank_that_dies_takes_its_site_out_and_the_site_comes_back(lab, parallel):
    lab = lab(1_000_000_000)
    coordinator, ticket = lab.coordinate(), lab.ticket("ranks")
    (first, second), native = ranks(lab, parallel, ticket=ticket), joined_later(lab)
    second.kill()
    assert first.wait(60) != 0
    assert "another rank of this site is gone, and the site with it" in said_by(lab, 0), logs(lab)
    assert "\nhint: what it said last tells why" in said_by(lab, 0)
    state = lambda: lab.state("ranks")
    lab.until("the site to be away", lambda: state() == "away")
    again = ranks(lab, parallel, ticket=ticket)
    train = lambda: all("trains" in said_by(lab, rank) for rank in range(2))
    lab.until("both ranks to train again", lambda: train() or again[0].poll() is not None)
    assert again[0].poll() is None, logs(lab)
    lab.until("the site to be back", lambda: state() != "away")
    for process in again:
        process.send_signal(signal.SIGTERM)
    assert [process.wait(60) for process in again] == [0, 0], logs(lab)
    assert all(said_by(lab, rank).endswith("leaving the run\nfinished False\n") for rank in range(2)), logs(lab)
    lab.until("the site to be away again", lambda: state() == "away")
    assert coordinator.poll() is None and native.poll() is None


@pytest.mark.parametrize("parallel", PARALLEL)
def test_an_error_in_one_rank_ends_all_of_them(lab, parallel):
    lab = lab(1_000_000_000)
    coordinator = lab.coordinate()
    processes, native = ranks(lab, parallel, FAILS), joined_later(lab)
    assert [process.wait(60) for process in processes] == [1, 1], logs(lab)
    assert "the engine's train() raised ValueError: the first rank has a bad day" in said_by(lab, 0), logs(lab)
    assert "of this site is gone" in said_by(lab, 1), logs(lab)
    lab.until("the site to be away", lambda: lab.state("ranks") == "away")
    assert coordinator.poll() is None and native.poll() is None


def test_rows_that_cannot_be_shared_are_said_not_to_be(lab):
    lab = lab(60_000)
    lab.coordinate()
    first, second = ranks(lab, "ddp", rows=3)
    assert first.wait(60) != 0
    said = said_by(lab, 0)
    assert "a micro-batch of 3 rows cannot be shared by 2 ranks\nhint: join with rows= a multiple of 2" in said, said
    assert second.wait(60) != 0


@pytest.mark.skipif(fully_shard is not None, reason="this PyTorch has FSDP2")
def test_an_old_pytorch_is_said_to_have_no_fsdp2():
    from atoll import ranks

    with pytest.raises(atoll.AtollError, match='parallel="fsdp" needs torch 2.6 or newer, and this is .*\nhint: update torch'):
        ranks.sharded(torch.nn.Linear(1, 1), torch.device("cpu"))


def test_an_unknown_way_to_be_parallel_is_met_with_those_that_are_known():
    with pytest.raises(atoll.AtollError, match="there is no parallel='zero3'\nhint: Atoll knows ddp, fsdp and own"):
        atoll.TorchEngine(atoll.Llama, parallel="zero3")
