"""A site of several accelerators: the ranks of one `torchrun`, which are one site to the coordinator.

    rank 0   the core: network, leases, codecs ──▶ Leader ──orders──▶ Follower   ranks 1, 2, …
                                                     engine            engine

What the core asks its engine for, the `Leader` tells all ranks, and each does its share: it trains on its rows of a
batch, and reads and writes its own shard. Orders, tokens and weights go over Gloo between the hosts' memories;
gradients go as DDP or FSDP2 send them. Losing a rank is losing the site: it leaves, and comes back as a whole.
"""

import contextlib
import logging
import os
from datetime import timedelta

import torch
from torch import distributed

from ._atoll import AtollError

log = logging.getLogger("atoll")

# What carries gradients between devices of a kind.
BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl", "musa": "mccl", "mlu": "cncl", "xpu": "xccl"}
# Followers wait as long as the site has nothing to train on.
PATIENCE = timedelta(days=365)
# What transports say when the other end is gone.
GONE = ("closed by peer", "connection reset", "broken pipe", "connection refused", "socket closed", "remote process exited",
        "connection was likely closed", "socket timeout", "failed to recv", "failed to send")


class Alone:
    """One process is the whole site."""

    rank, size = 0, 1

    def share(self, thing):
        """Rank 0's thing, at every rank."""
        return thing

    def sum(self, numbers):
        """The sum over all ranks of a vector, as a list."""
        return numbers.tolist()


class Ranks:
    """The processes of one site."""

    def __init__(self):
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self.talk = None
        self.meet()

    @property
    def group(self):
        """The ranks' group on Gloo."""
        if self.talk is None:
            raise AtollError("this site has left its run\nhint: join again with the same ticket")
        return self.talk

    def meet(self):
        """Begins to talk, unless they talk already. All ranks make this call."""
        if self.talk is None:
            self.talk = distributed.new_group(backend="gloo", timeout=PATIENCE)

    def part(self):
        """Ends the talk; whoever waits for this rank learns that it is gone.

        It waits for Gloo's threads: one that lets go of what it sent last while the interpreter ends wants the
        interpreter's lock, does not get it, and aborts the process.
        """
        group, self.talk = self.talk, None
        if group is not None:
            with contextlib.suppress(ValueError, AssertionError):  # The script has ended all groups.
                distributed.destroy_process_group(group)

    def share(self, thing=None):
        """Rank 0's thing, at every rank."""
        box = [thing]
        with unbroken(self.rank):
            distributed.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def sum(self, numbers):
        """The sum over all ranks of a vector, as a list; the same bits at all of them."""
        host = numbers.detach().double().cpu()
        with unbroken(self.rank):
            distributed.all_reduce(host, group=self.group)
        return host.tolist()

    def gather(self, own, parts):
        """Every rank's vector, all equally long, into rank 0's `parts`."""
        with unbroken(self.rank):
            distributed.gather(own, parts, dst=0, group=self.group)

    def scatter(self, own, parts):
        """Rank 0's `parts` to the ranks they are for."""
        with unbroken(self.rank):
            distributed.scatter(own, parts, src=0, group=self.group)

    def broadcast(self, vector):
        """Rank 0's vector, written over every other rank's."""
        with unbroken(self.rank):
            distributed.broadcast(vector, src=0, group=self.group)

    def all(self, thing):
        """Every rank's thing, in their order, at every rank."""
        things = [None] * self.size
        with unbroken(self.rank):
            distributed.all_gather_object(things, thing, group=self.group)
        return things


def here(device):
    """The ranks of this process's site; begins to talk to them if `torchrun` has started several."""
    if not distributed.is_available():
        return Alone()
    if not distributed.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if device.type not in ("cpu", "mps"):
            getattr(torch, device.type).set_device(device)
        distributed.init_process_group(BACKENDS.get(device.type, "gloo"))
    several = distributed.is_initialized() and distributed.get_world_size() > 1
    return Ranks() if several else Alone()


@contextlib.contextmanager
def unbroken(rank):
    """Says in one sentence that another rank is gone."""
    try:
        yield
    except RuntimeError as error:
        if not any(mark in str(error).lower() for mark in GONE):
            raise
        other = "another rank" if rank == 0 else "rank 0"
        raise AtollError(
            f"{other} of this site is gone, and the site with it\nhint: what it said last tells why; the same torchrun command "
            "brings the site back"
        ) from None


# ---- how weights lie over the ranks ----


def is_shard(parameter):
    """Whether a parameter is one rank's part of a whole: a DTensor, as FSDP2 makes them."""
    return hasattr(parameter, "placements") and hasattr(parameter, "device_mesh")


def local(tensor):
    """What this rank holds of a tensor, which may be all of it."""
    return tensor.to_local() if is_shard(tensor) else tensor


def layout(engine):
    """How the weights of an opened engine lie over its ranks."""
    parameters = engine.weights.parameters.values()
    return (Shards if any(map(is_shard, parameters)) else Copies)(engine)


class Copies:
    """Every rank holds all weights, as under DDP."""

    def __init__(self, engine):
        self.engine, self.ranks = engine, engine.ranks

    def read(self, fragment, whole=None):
        if whole is not None:
            self.engine.read(fragment, whole)

    def write(self, fragment, whole=None):
        self.engine.write(fragment, self.spread(fragment, whole))

    def add(self, fragment, whole=None):
        self.engine.add(fragment, self.spread(fragment, whole))

    def spread(self, fragment, whole):
        """Rank 0's vector of the fragment, at every rank."""
        host = torch.empty(self.engine.weights.lens[fragment]) if whole is None else torch.from_numpy(whole)
        self.ranks.broadcast(host)
        return host.numpy()


class Shards:
    """Every rank holds its part of each tensor, as under FSDP2.

    A rank's part of a fragment is one vector: its parts of the fragment's tensors, one after the other. Only rank 0 has
    room for a whole fragment, in the host's memory.
    """

    def __init__(self, engine):
        self.engine, self.ranks = engine, engine.ranks
        # For each rank, for each fragment: the places of its pieces in their tensors.
        self.places = self.ranks.all([[place_of(piece.parameter) for piece in pieces] for pieces in engine.weights.fragments])
        sizes = [[sum(map(count, places)) for places in rank] for rank in self.places]
        self.longest = [max(rank[fragment] for rank in sizes) for fragment in range(len(engine.weights.fragments))]

    def read(self, fragment, whole=None):
        own = self.room(fragment)
        self.engine.read(fragment, self.part(own, fragment).numpy())
        parts = None if whole is None else [self.room(fragment) for _ in range(self.ranks.size)]
        self.ranks.gather(own, parts)
        for rank, part in enumerate(parts or []):
            for piece, vector in self.pieces(fragment, rank, part, whole):
                piece.copy_(vector)

    def write(self, fragment, whole=None):
        self.engine.write(fragment, self.deal(fragment, whole))

    def add(self, fragment, whole=None):
        self.engine.add(fragment, self.deal(fragment, whole))

    def deal(self, fragment, whole):
        """This rank's part of rank 0's vector of the fragment."""
        own = self.room(fragment)
        parts = None if whole is None else [self.room(fragment) for _ in range(self.ranks.size)]
        for rank, part in enumerate(parts or []):
            for piece, vector in self.pieces(fragment, rank, part, whole):
                vector.copy_(piece)
        self.ranks.scatter(own, parts)
        return self.part(own, fragment).numpy()

    def room(self, fragment):
        """Memory for any rank's part of a fragment."""
        return torch.zeros(self.longest[fragment])

    def part(self, vector, fragment):
        return vector[: self.engine.weights.lens[fragment]]

    def pieces(self, fragment, rank, part, whole):
        """For each of a rank's pieces its place in the whole fragment, and its place in the rank's vector."""
        start, at, whole = 0, 0, torch.from_numpy(whole)
        for tensor, place in zip(self.engine.run.fragments[fragment], self.places[rank][fragment]):
            piece = whole[start : start + tensor.len].view(tensor.shape)[tuple(slice(*span) for span in place)]
            yield piece, part[at : at + count(place)].view(piece.shape)
            start, at = start + tensor.len, at + count(place)


def place_of(parameter):
    """Where this rank's part of a tensor lies: first and last + 1 in each dimension."""
    if not is_shard(parameter):
        return [(0, size) for size in parameter.shape]
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes, firsts = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    # An empty part may be said to begin behind the end.
    return [(min(first, whole), min(first + size, whole)) for first, size, whole in zip(firsts, sizes, parameter.shape)]


def count(place):
    """Weights at a place."""
    product = 1
    for first, end in place:
        product *= end - first
    return product


# ---- how a model is spread over the ranks ----


def copied(model, device):
    """The model under DDP."""
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(model, device_ids=None if device.type == "cpu" else [device])


def sharded(model, device):
    """The model under FSDP2: each layer, and the rest together."""
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
    except ImportError:
        raise AtollError(f"parallel=\"fsdp\" needs torch 2.6 or newer, and this is {torch.__version__}\n"
                         'hint: update torch, or use parallel="ddp"') from None
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for layers in [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]:
        for layer in layers:
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


SPREAD = {"ddp": copied, "fsdp": sharded}


def gather_later(model, is_last):
    """While it is entered, FSDP2 and DDP keep gradients to themselves unless the micro-batch is the last."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(is_last)
    elif hasattr(model, "no_sync") and not is_last:
        return model.no_sync()
    return contextlib.nullcontext()


def forget_gathered(model):
    """Frees what FSDP2 has gathered for a forward pass without a backward one; it would be used again."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


# ---- who does what ----


class Leader:
    """Rank 0's engine as the core sees it."""

    def __init__(self, engine):
        self.engine, self.ranks = engine, engine.ranks
        self.staging = engine.staging
        self.ranks.meet()

    @property
    def computes_in(self):
        return self.engine.computes_in

    def open(self, run, batches):
        self.ranks.share(("open", run))
        self.engine.open(run, batches)
        self.layout = layout(self.engine)

    def read(self, fragment, weights):
        self.ranks.share(("read", fragment))
        self.layout.read(fragment, weights)

    def write(self, fragment, weights):
        self.ranks.share(("write", fragment))
        self.layout.write(fragment, weights)

    def add(self, fragment, change):
        self.ranks.share(("add", fragment))
        self.layout.add(fragment, change)

    def evaluate(self, batch):
        self.ranks.share(("evaluate",))
        return self.engine.evaluate(batch)

    def announce(self):
        """All ranks take a step."""
        self.ranks.share(("step",))

    def end(self, finished, is_heard):
        """All ranks are told that the site's life is over, if they listen: within a step they wait for the rest of it, and
        notice that this one is gone. So does who is gone already."""
        if is_heard:
            with contextlib.suppress(AtollError):
                self.ranks.share(("end", finished))
        self.ranks.part()


class Follower:
    """What every other rank does between two steps: what the Leader says."""

    def __init__(self, engine):
        self.engine, self.ranks, self.layout, self.finished = engine, engine.ranks, None, False
        self.ranks.meet()

    def await_step(self):
        """Obeys until the next step (true), or the end (false)."""
        while True:
            order, *arguments = self.ranks.share()
            if order == "step":
                return True
            if order == "end":
                (self.finished,) = arguments
                self.ranks.part()
                return False
            self.obey(order, *arguments)

    def obey(self, order, *arguments):
        if order == "open":
            self.engine.open(*arguments, None)
            self.layout = layout(self.engine)
        elif order == "evaluate":
            self.engine.evaluate(None)
        else:
            getattr(self.layout, order)(*arguments)
