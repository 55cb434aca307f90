"""TorchEngine: any PyTorch model on any device of PyTorch's as an engine.

Inside, it computes in fp32, bf16 or fp16; what it hands over is host fp32. A step reads all of its rows at once, so
it starves as a whole or not at all; it looks for anything that is not finite before it touches the weights.
"""

import contextlib
import math

import numpy
import torch
from torch.nn import functional

from . import devices, ranks
from ._atoll import AtollError, NonFinite, Starved
from .llama import Llama
from .optim import RunOptimizer
from .run import Run
from .weights import Weights, match

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TorchEngine:
    """Trains `model` on `device`.

    model       a module whose parameters have the run's (Hugging Face's) names, or a function from the run's model
                settings, a dict, to one: `atoll.Llama` is one.
    optimizer   a torch.optim.Optimizer of the model's parameters, or a function from them to one; without it, the run's
                own AdamW or Muon, with its schedule, decay and clipping.
    batches     an iterable of your own token batches (B, T+1). Then leases count your samples, but which text they
                were is yours to keep account of. Without it, batches are the run's, exactly once.
    device      by name: "cpu", "cuda:0", "npu:0", ...; without it, where the model is.
    precision   what is computed in: "fp32", "bf16" or "fp16"; parameters may be of another type.
    forward     (model, tokens, mask) -> logits, for models that are called in another way.
    parallel    under torchrun: "ddp" (each rank has the whole model) or "fsdp" (FSDP2: each has a part of each tensor); "own"
                leaves the model as it is, spread over the ranks by you or not at all. The ranks are one site together.
    """

    def __init__(self, model, optimizer=None, batches=None, *, device=None, precision="fp32", forward=None, parallel="ddp"):
        if precision not in PRECISIONS:
            raise AtollError(f"there is no precision '{precision}'\nhint: Atoll knows {', '.join(PRECISIONS)}")
        if parallel not in (*ranks.SPREAD, "own"):
            raise AtollError(f"there is no parallel='{parallel}'\nhint: Atoll knows {', '.join(ranks.SPREAD)} and own")
        self.model, self.optimizer, self.precision = model, optimizer, precision
        self.own = None if batches is None else iter(batches)
        self.device = devices.find(device or place_of(model))
        self.ranks, self.parallel = ranks.here(self.device), parallel
        self.forward = forward or logits
        self.loss_scale = 2.0**16 if precision == "fp16" else 1.0
        self.steps = 0

    # ---- what the site calls ----

    def open(self, run, batches):
        """Gets the model ready for a run."""
        self.run, self.leased = Run.parse(run), batches
        self.rows = self.share_of(self.run.rows)
        if not isinstance(self.model, torch.nn.Module):
            self.model = self.model(self.run.model)
        match(self.run, self.model)
        if hasattr(getattr(self.model, "config", None), "use_cache"):
            self.model.config.use_cache = False
        with self.memory("the model"):
            self.model = self.spread(self.model.to(self.device).train())
        self.weights = Weights(self.run, self.model)
        self.tensors = [(tensor, self.weights.parameters[tensor.name]) for tensor in self.run.tensors]
        if self.optimizer is None:
            self.optimizer = RunOptimizer(self.run.training, self.tensors)
        elif not hasattr(self.optimizer, "step"):
            self.optimizer = self.optimizer(self.model.parameters())

    def spread(self, model):
        """The model over the site's ranks, unless it is that already."""
        is_spread = hasattr(model, "no_sync") or any(map(ranks.is_shard, model.parameters()))
        if self.ranks.size == 1 or self.parallel == "own" or is_spread:
            return model
        return ranks.SPREAD[self.parallel](model, self.device)

    def share_of(self, rows):
        """How many of a micro-batch's rows this rank computes."""
        if rows % self.ranks.size != 0:
            raise AtollError(f"a micro-batch of {rows} rows cannot be shared by {self.ranks.size} ranks\n"
                             f"hint: join with rows= a multiple of {self.ranks.size}")
        return rows // self.ranks.size

    def staging(self, length):
        return devices.host_memory(length, self.device).numpy()

    def read(self, fragment, weights):
        self.weights.read(fragment, weights)

    def write(self, fragment, weights):
        self.weights.write(fragment, weights)

    def add(self, fragment, change):
        self.weights.add(fragment, change)

    def train(self, steps):
        tokens, nats = 0, 0.0
        for _ in range(steps):
            batch = self.next_batch()
            count = batch.tokens[:, 1:].numel() * self.ranks.size
            what = f"a step of {self.rows} rows of {batch.tokens.shape[1] - 1} tokens"
            with self.memory(what), ranks.unbroken(self.ranks.rank):
                nats += count * self.step(batch)
            tokens += count
        return tokens, nats / max(tokens, 1)

    def evaluate(self, batch):
        whole = self.ranks.share(None if batch is None else Batch.of(batch))
        total = torch.zeros(1, dtype=torch.float64)
        self.model.eval()
        with torch.no_grad(), self.memory("evaluation"), ranks.unbroken(self.ranks.rank):
            for part, counts in whole.dealt(self.ranks, self.rows):
                total += counts * self.nats(part).double().cpu()
        ranks.forget_gathered(self.model)
        self.model.train()
        return self.ranks.sum(total)[0]

    # ---- a step ----

    def next_batch(self):
        """This rank's samples of one inner step."""
        leased = self.ranks.share(self.lease() if self.ranks.rank == 0 else None)
        if leased is None:
            raise Starved(f"the feed has fewer than {self.run.samples} leased samples")
        leased = leased.of_rank(self.ranks)
        if self.own is None:
            return leased
        try:
            tokens = torch.as_tensor(numpy.asarray(next(self.own)), dtype=torch.int64)
        except StopIteration:
            raise AtollError("your batches have come to an end before the run\nhint: repeat them, or leave batches= out") from None
        return Batch(tokens, None, leased.progress)

    def lease(self):
        """All ranks' samples of one inner step; None if so many are not leased."""
        try:
            return Batch.of(self.leased.next(self.run.samples))
        except Starved:
            if self.ranks.size == 1:
                raise
            return None

    def step(self, batch):
        """One inner step; the mean loss per token before it."""
        loss, norm = self.gradients(batch)
        clip = getattr(self.optimizer, "clip_norm", 0.0)
        if clip > 0 and norm > clip:
            self.scale_gradients(clip / (norm + 1e-6))
        if isinstance(self.optimizer, RunOptimizer):
            self.optimizer.step(batch.progress)
        else:
            self.optimizer.step()
        self.steps += 1
        return loss

    def gradients(self, batch):
        """Writes the gradients of the mean loss; that loss and the gradients' norm, both finite."""
        count = batch.tokens[:, 1:].numel() * self.ranks.size
        while True:
            # DDP and FSDP2 take the mean over the ranks.
            nats = self.backward(batch, self.loss_scale * self.ranks.size / count)
            nats, *norms = self.summed(nats)
            what = self.first_non_finite(nats, norms)
            if what is None:
                break
            # In fp16, gradients overflow now and then: again with half the scale.
            self.loss_scale /= 2
            if self.loss_scale < 1.0 or not math.isfinite(nats):
                raise NonFinite(f"{what} became non-finite at inner step {self.steps + 1}\n"
                                "hint: lower the learning rate, or look at the data around this step")
        if self.loss_scale != 1.0:
            self.scale_gradients(1 / self.loss_scale)
        norm = math.sqrt(sum(norm * norm for norm in norms)) / self.loss_scale
        return nats / count, norm

    def summed(self, nats):
        """The summed loss of all ranks, and the norm of each tensor's gradient."""
        norms = torch.stack([ranks.local(parameter.grad.detach()).float().norm() for _, parameter in self.tensors])
        if self.ranks.size == 1:
            return torch.cat([nats.reshape(1), norms]).tolist()  # One wait for the device.
        # Of a sharded gradient each rank has a part, of any other each has the same.
        shares = torch.tensor([1.0 if ranks.is_shard(parameter) else 1 / self.ranks.size for _, parameter in self.tensors])
        squares = norms.double().square() * shares.to(norms.device)
        nats, *squares = self.ranks.sum(torch.cat([nats.double().reshape(1), squares]))
        return [nats, *map(math.sqrt, squares)]

    def backward(self, batch, scale):
        """Adds up the micro-batches' gradients of the summed loss times `scale`; the summed loss."""
        for _, parameter in self.tensors:
            parameter.grad = None
        total = torch.zeros((), device=self.device)
        parts = list(batch.parts(self.rows))
        for number, part in enumerate(parts, 1):
            with ranks.gather_later(self.model, number == len(parts)):
                nats = self.nats(part)
                (nats * scale).backward()
            total += nats.detach()
        unused = next((tensor.name for tensor, parameter in self.tensors if parameter.grad is None), None)
        if unused is not None:
            raise AtollError(f"the loss does not depend on {unused}\nhint: check the model's forward()")
        return total

    def nats(self, batch):
        """Summed loss of the present weights."""
        tokens = batch.tokens.to(self.device)
        mask = None if batch.starts is None else sees(batch.starts.to(self.device))
        with self.autocast():
            scores = self.forward(self.model, tokens[:, :-1], mask)
        return functional.cross_entropy(scores.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")

    def first_non_finite(self, nats, norms):
        if not math.isfinite(nats):
            return "the loss"
        bad = (tensor.name for (tensor, _), norm in zip(self.tensors, norms) if not math.isfinite(norm))
        return next((f"the gradient of {name}" for name in bad), None)

    def gradients_of(self, batch):
        """Gradients of the mean loss of any batch, by the tensor's name: float32 arrays (flat), to compare with others."""
        own = Batch.of(batch).of_rank(self.ranks)
        with self.memory(f"a step of {len(own.tokens)} rows of {own.tokens.shape[1] - 1} tokens"):
            self.gradients(own)
        return {tensor.name: parameter.grad.detach().float().cpu().numpy().ravel() for tensor, parameter in self.tensors}

    def scale_gradients(self, factor):
        for _, parameter in self.tensors:
            parameter.grad.mul_(factor)

    # ---- the device ----

    def autocast(self):
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=PRECISIONS[self.precision])

    def memory(self, what):
        return Memory(self.device, what)

    def describe(self):
        """The device for people."""
        kind = str(self.device) if self.ranks.size == 1 else f"{self.ranks.size} × {self.device.type}"
        name = f"{kind}, {self.precision}, torch {torch.__version__}"
        if self.device.type == "cuda":
            return f"{torch.cuda.get_device_name(self.device)}, {name}"
        return name

    @property
    def computes_in(self):
        """The least of the precision of the computing and of the parameters."""
        kinds = {"fp32", self.precision} | {name for name, kind in PRECISIONS.items() for p in self.model.parameters() if p.dtype == kind}
        return next(kind for kind in ("bf16", "fp16", "fp32") if kind in kinds)

    @property
    def threads(self):
        """Threads of the host that training keeps busy."""
        return torch.get_num_threads() if self.device.type == "cpu" else 1


class Batch:
    """Samples as tensors: tokens (B, T+1), starts (B, T) or None."""

    def __init__(self, tokens, starts, progress):
        self.tokens, self.starts, self.progress = tokens, starts, progress

    @classmethod
    def of(cls, batch):
        starts = None if batch.starts is None else torch.from_numpy(batch.starts)
        return cls(torch.from_numpy(batch.tokens), starts, batch.progress)

    def __getitem__(self, rows):
        """Some of the rows."""
        return Batch(self.tokens[rows], None if self.starts is None else self.starts[rows], self.progress)

    def parts(self, rows):
        """Pieces of at most `rows` rows."""
        for at in range(0, len(self.tokens), rows):
            yield self[at : at + rows]

    def of_rank(self, ranks):
        """The rows of one rank."""
        return self[ranks.rank :: ranks.size]

    def dealt(self, ranks, rows):
        """A rank's pieces, as many as every other rank's, and whether each counts: sharded models compute together."""
        own = self.of_rank(ranks)
        most = math.ceil(len(self.tokens) / ranks.size)
        for at in range(0, most, rows):
            part = own[at : at + rows]
            yield (part, 1.0) if len(part.tokens) else (self[:1], 0.0)


class Memory:
    """Says in one sentence when a device has no memory left."""

    def __init__(self, device, what):
        self.device, self.what = device, what

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        if error is not None and not isinstance(error, AtollError) and devices.is_out_of_memory(error):
            raise AtollError(
                f"{self.device} is out of memory for {self.what}\n"
                "hint: join with fewer rows=, or compute in precision=\"bf16\""
            ) from None


def place_of(model):
    parameter = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
    return "cpu" if parameter is None else str(parameter.device)


def sees(starts):
    """Whether a token may see another: (B, T, T), from the position of the first that it may see."""
    at = torch.arange(starts.shape[1], device=starts.device)
    return (at <= at[:, None]) & (at >= starts[:, :, None])


def logits(model, tokens, mask):
    """Calls a model as Hugging Face's or Atoll's own are called."""
    if mask is None:
        scores = model(tokens)
    elif isinstance(getattr(model, "module", model), Llama):
        scores = model(tokens, mask)
    else:
        lowest = torch.finfo(torch.float32).min
        scores = model(tokens, attention_mask=(~mask[:, None]).float() * lowest)
    return getattr(scores, "logits", scores)
