"""What an engine knows of the run: the model's shape, how to train it, and the layout of its weights."""

import json
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Tensor:
    """One named tensor of the model; `kind` is "embedding", "matrix" or "vector"."""

    name: str
    shape: tuple
    kind: str

    @property
    def len(self):
        return math.prod(self.shape)


@dataclass(frozen=True)
class Run:
    """A run as far as an engine is concerned. `model` and `training` have the words of config.json and run.toml."""

    model: dict
    training: dict
    rows: int
    """Samples per micro-batch at this site."""
    tensors: list
    fragments: list
    """For each fragment the tensors whose weights it concatenates."""
    align: str = None
    """What happens at joining if the engine does not compute what the native one does: "warn", "refuse", or no look at it."""

    @classmethod
    def parse(cls, text):
        said = json.loads(text)
        tensors = [Tensor(t["name"], tuple(t["shape"]), t["kind"]) for t in said["tensors"]]
        fragments = [[tensors[index] for index in members] for members in said["fragments"]]
        return cls(said["model"], said["training"], said["rows"], tensors, fragments, said["align"])

    @property
    def samples(self):
        """Samples of an inner step."""
        return self.rows * self.training["accumulate"]
