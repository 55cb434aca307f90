"""A model's parameters as the run's fragments: host float32, in the order of the manifest, by Hugging Face's names."""

from dataclasses import dataclass

import torch

from ._atoll import AtollError
from .ranks import local

# What wrappers put before a parameter's name.
WRAPPERS = ("module.", "_orig_mod.")


@dataclass
class Piece:
    """A parameter, and the place of what this rank holds of it in its vector of the fragment."""

    parameter: torch.nn.Parameter
    start: int
    end: int


class Weights:
    """Reads, writes and adds to the weights of `model`, fragment by fragment. Of sharded parameters, to this rank's part.

    A parameter in bf16 or fp16 cannot hold what the run's fp32 says. What its rounding lost is kept beside it, so that
    reading gives back what was written, and small commits add up.
    """

    def __init__(self, run, model):
        self.parameters = match(run, model)
        self.fragments = []
        for members in run.fragments:
            pieces, start = [], 0
            for tensor in members:
                parameter = self.parameters[tensor.name]
                end = start + local(parameter).numel()
                pieces.append(Piece(parameter, start, end))
                start = end
            self.fragments.append(pieces)
        self.lens = [pieces[-1].end if pieces else 0 for pieces in self.fragments]
        self.lost = {}

    def pieces(self, fragment, array):
        """What this rank holds of a fragment's parameters, the parameters, and their parts of `array` in the same shape."""
        host = torch.from_numpy(array)
        for piece in self.fragments[fragment]:
            own = local(piece.parameter.detach())
            yield own, piece.parameter, host[piece.start : piece.end].view(own.shape)

    @torch.no_grad()
    def read(self, fragment, weights):
        for own, parameter, host in self.pieces(fragment, weights):
            host.copy_(self.exact(own, parameter))

    @torch.no_grad()
    def write(self, fragment, weights):
        for own, parameter, host in self.pieces(fragment, weights):
            self.put(own, parameter, host.to(own.device))

    @torch.no_grad()
    def add(self, fragment, change):
        for own, parameter, host in self.pieces(fragment, change):
            self.put(own, parameter, self.exact(own, parameter) + host.to(own.device))

    def exact(self, own, parameter):
        """A parameter's own part in fp32, with what its rounding lost."""
        lost = self.lost.get(parameter)
        return own.float() if lost is None else own.float() + lost

    def put(self, own, parameter, wide):
        own.copy_(wide)
        if own.dtype != torch.float32:
            self.lost[parameter] = wide - own.float()


def match(run, model):
    """The model's parameters by the run's names; or every reason why they are not the run's."""
    ours = {bare(name): parameter for name, parameter in model.named_parameters()}
    theirs = {tensor.name: tensor for tensor in run.tensors}
    problems = [f"{name} {tuple(ours[name].shape)} is not in the run" for name in ours if name not in theirs]
    for name, tensor in theirs.items():
        if name not in ours:
            problems.append(f"{name} {tensor.shape} is missing")
        elif tuple(ours[name].shape) != tensor.shape:
            problems.append(f"{name} has the shape {tuple(ours[name].shape)}, expected {tensor.shape}")
        elif not ours[name].requires_grad:
            problems.append(f"{name} is frozen (requires_grad is false)")
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise AtollError(
            f"the model's tensors are not the run's: {'; '.join(problems[:3])}{more}\n"
            f"hint: build it from the run's shape, {shape(run)}; atoll.TorchEngine(atoll.Llama) does"
        )
    return ours


def bare(name):
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def shape(run):
    return ", ".join(f"{key}={value}" for key, value in run.model.items())
