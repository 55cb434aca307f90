"""The run's own inner optimizers, with its schedule: what every engine of the run uses unless a site brings its own.

AdamW moves everything, or, beside Muon, what is no matrix of a layer. Embeddings have a rate and a floor of their own,
gains do not decay. The schedule warms up over this engine's steps and falls along a cosine over the whole run.
"""

import math

import torch

from ._atoll import AtollError

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class RunOptimizer:
    """Steps all parameters; `tensors` are pairs of the run's tensor and its parameter."""

    def __init__(self, training, tensors):
        self.settings, self.steps = training["optimizer"], 0
        muon = training["muon"]
        matrices = [parameter for tensor, parameter in tensors if muon and tensor.kind == "matrix"]
        others = [(tensor, parameter) for tensor, parameter in tensors if not (muon and tensor.kind == "matrix")]
        self.parts = adamw(self.settings, others)
        if matrices:
            self.parts.append(Muon(matrices, muon))
        self.rates = [[group["lr"] for group in part.param_groups] for part in self.parts]

    @property
    def clip_norm(self):
        return self.settings["clip_norm"]

    def step(self, progress):
        """One step, at `progress` of the run."""
        share = schedule(self.settings, self.steps, progress)
        for part, rates in zip(self.parts, self.rates):
            for group, rate in zip(part.param_groups, rates):
                group["lr"] = rate * share
            part.step()
        self.steps += 1


def schedule(settings, steps, progress):
    """What the step after `steps` others multiplies a learning rate with."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
    warmup = (steps + 1) / max(settings["warmup_steps"], 1)
    final = settings["final_share"]
    return (final + (1 - final) * cosine) * min(warmup, 1.0)


def adamw(settings, tensors):
    """The optimizers of `tensors`: PyTorch's own, and one for embeddings with a floor, which PyTorch's cannot have."""
    rate, pace, decay = settings["learning_rate"], settings["embedding_rate"], settings["weight_decay"]
    if pace <= 0 and any(tensor.kind == "embedding" for tensor, _ in tensors):
        raise AtollError("training.optimizer.embedding_rate = 0 freezes the embeddings, which this engine cannot\nhint: set it above 0")
    of = lambda *kinds: [parameter for tensor, parameter in tensors if tensor.kind in kinds]
    # PyTorch multiplies decay by the group's rate, the run by the common one.
    embeddings = dict(params=of("embedding"), lr=rate * pace, weight_decay=decay / pace)
    others = [
        dict(params=of("matrix"), lr=rate, weight_decay=decay),
        dict(params=of("vector"), lr=rate, weight_decay=0.0),
    ]
    moments = dict(betas=(settings["beta1"], settings["beta2"]), eps=settings["eps"])
    filled = lambda groups: [group for group in groups if group["params"]]
    if settings["embedding_floor"] <= 0:
        return [torch.optim.AdamW(filled([*others, embeddings]), **moments)]
    parts = [torch.optim.AdamW(filled(others), **moments)] if filled(others) else []
    return parts + [FlooredAdamW(filled([embeddings]), settings["embedding_floor"], **moments)]


class FlooredAdamW(torch.optim.Optimizer):
    """AdamW whose every √v̂ is raised by `floor` times the root of the tensor's mean v̂."""

    def __init__(self, parameters, floor, betas, eps):
        super().__init__(parameters, dict(floor=floor, betas=betas, eps=eps))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.move(parameter, group, self.state[parameter])

    def move(self, parameter, group, state):
        if not state:
            state.update(steps=0, mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter))
        (beta1, beta2), mean, square = group["betas"], state["mean"], state["square"]
        state["steps"] += 1
        mean.mul_(beta1).add_(parameter.grad, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
        correction = 1 - beta2 ** state["steps"]
        floor = group["floor"] * (square.mean() / correction).sqrt() + group["eps"]
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_(mean / ((square / correction).sqrt() + floor), alpha=group["lr"] / (1 - beta1 ** state["steps"]))


class Muon(torch.optim.Optimizer):
    """Momentum whose every matrix is brought near the closest orthogonal one, and scaled to an update of AdamW's size."""

    def __init__(self, parameters, settings):
        super().__init__(parameters, dict(lr=settings["learning_rate"]))
        self.settings = settings

    @torch.no_grad()
    def step(self):
        mu, decay = self.settings["momentum"], self.settings["weight_decay"]
        for group in self.param_groups:
            for parameter in group["params"]:
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momentum.mul_(mu).add_(parameter.grad)
                update = parameter.grad + mu * momentum if self.settings["nesterov"] else momentum
                size = 0.2 * math.sqrt(max(parameter.shape))
                parameter.mul_(1 - group["lr"] * decay)
                parameter.sub_(orthogonal(update, self.settings["iterations"]), alpha=group["lr"] * size)


def orthogonal(matrix, iterations):
    """Newton–Schulz: X ← a X + (b A + c A²) X with A = X Xᵀ."""
    a, b, c = NEWTON_SCHULZ
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide.float() / wide.float().norm().clamp(min=1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide is matrix else x.T).to(matrix.dtype)
