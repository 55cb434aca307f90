"""TorchEngine: any PyTorch model on any device of PyTorch's as an engine.

Inside, it computes in fp32, bf16 or fp16; what it hands over is host fp32. A step reads all of its rows at once, so
it starves as a whole or not at all; it looks for anything that is not finite before it touches the weights.
"""

from . import devices  # Before torch: it keeps plug-ins from being imported with it.

import contextlib
import math

import numpy
import torch
from torch.nn import functional

from ._atoll import AtollError, NonFinite
from .llama import Llama
from .optim import RunOptimizer
from .run import Run
from .weights import Weights

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
    """

    def __init__(self, model, optimizer=None, batches=None, *, device=None, precision="fp32", forward=None):
        if precision not in PRECISIONS:
            raise AtollError(f"there is no precision '{precision}'\nhint: Atoll knows {', '.join(PRECISIONS)}")
        self.model, self.optimizer, self.precision = model, optimizer, precision
        self.own = None if batches is None else iter(batches)
        self.device = devices.find(device or place_of(model))
        self.forward = forward or logits
        self.loss_scale = 2.0**16 if precision == "fp16" else 1.0
        self.steps = 0

    # ---- what the site calls ----

    def open(self, run, batches):
        """Gets the model ready for a run."""
        self.run, self.leased = Run.parse(run), batches
        if not isinstance(self.model, torch.nn.Module):
            self.model = self.model(self.run.model)
        self.weights = Weights(self.run, self.model)
        with self.memory("the model"):
            self.model.to(self.device).train()
        if hasattr(getattr(self.model, "config", None), "use_cache"):
            self.model.config.use_cache = False
        self.tensors = [(tensor, self.weights.parameters[tensor.name]) for tensor in self.run.tensors]
        if self.optimizer is None:
            self.optimizer = RunOptimizer(self.run.training, self.tensors)
        elif not hasattr(self.optimizer, "step"):
            self.optimizer = self.optimizer(self.model.parameters())

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
            count = batch.tokens[:, 1:].numel()
            with self.memory(f"a step of {self.run.rows} rows of {batch.tokens.shape[1] - 1} tokens"):
                nats += count * self.step(batch)
            tokens += count
        return tokens, nats / max(tokens, 1)

    def evaluate(self, batch):
        batch = Batch.of(batch)
        self.model.eval()
        with torch.no_grad(), self.memory("evaluation"):
            nats = sum(self.nats(part).double().item() for part in batch.parts(self.run.rows))
        self.model.train()
        return nats

    # ---- a step ----

    def next_batch(self):
        """The samples of one inner step."""
        leased = Batch.of(self.leased.next(self.run.samples))
        if self.own is None:
            return leased
        try:
            tokens = torch.as_tensor(numpy.asarray(next(self.own)), dtype=torch.int64)
        except StopIteration:
            raise AtollError("your batches have come to an end before the run\nhint: repeat them, or leave batches= out") from None
        return Batch(tokens, None, leased.progress)

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
        while True:
            nats = self.backward(batch, self.loss_scale / batch.tokens[:, 1:].numel())
            norms = torch.stack([parameter.grad.detach().float().norm() for _, parameter in self.tensors])
            nats, *norms = torch.cat([nats.reshape(1), norms]).tolist()  # One wait for the device.
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
        return nats / batch.tokens[:, 1:].numel(), norm

    def backward(self, batch, scale):
        """Adds up the micro-batches' gradients of the summed loss times `scale`; the summed loss."""
        for _, parameter in self.tensors:
            parameter.grad = None
        total = torch.zeros((), device=self.device)
        for part in batch.parts(self.run.rows):
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
        name = f"{self.device}, {self.precision}, torch {torch.__version__}"
        if self.device.type == "cuda":
            return f"{torch.cuda.get_device_name(self.device)}, {name}"
        return name

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

    def parts(self, rows):
        """Pieces of at most `rows` rows."""
        for at in range(0, len(self.tokens), rows):
            starts = None if self.starts is None else self.starts[at : at + rows]
            yield Batch(self.tokens[at : at + rows], starts, self.progress)


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
    elif isinstance(model, Llama):
        scores = model(tokens, mask)
    else:
        lowest = torch.finfo(torch.float32).min
        scores = model(tokens, attention_mask=(~mask[:, None]).float() * lowest)
    return getattr(scores, "logits", scores)
