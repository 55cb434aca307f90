#!/usr/bin/env python3
"""What Atoll costs inside a training process: one PyTorch site that drives itself, in a run of its own.

    python bench/overhead.py --atoll target/release/atoll                    # the wheel must be installed: python/README.md

The loop is the user's: forward, backward, optimizer.step(), then `site.after_step`. Between rounds that call hands a baton to the core and
takes it back; in a round the core also copies weights out or adds what others have learnt. Looking at held-out text is on top of that and counted
apart. Neither the first quarter of the steps nor the last counts, which waits for the run's end. Memory is what the process holds beyond what it held
while it trained and looked at text alone, in copies of the parameters (4 bytes each): in use, and with what the allocator keeps for later. Linux with glibc.
"""

import argparse
import ctypes
import json
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import atoll  # Before torch.
import torch
from torch.nn import functional

WORDS = ["reef", "tide", "palm", "shell", "current", "island", "lagoon", "coral", "sand", "wave"]
ALONE_STEPS = 5


def main():
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(arguments, Path(folder))
        try:
            measured = train(arguments, run)
        finally:
            run.end()
    show(measured)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(measured, indent=1))


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--atoll", required=True, help="the `atoll` command")
    parser.add_argument("--data", help="text to train on; without it, words drawn by chance")
    parser.add_argument("--preset", default="mini", help="the model's size")
    parser.add_argument("--context", type=int, default=64, help="tokens a row: few make short steps, beside which more shows")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="a file for the results")
    return parser.parse_args()


class Run:
    """A run folder and its coordinator."""

    def __init__(self, arguments, folder):
        self.command, self.folder, self.dir = arguments.atoll, folder, folder / "run"
        self.data = Path(arguments.data) if arguments.data else text(folder / "text")
        tokens = arguments.steps * arguments.rows * arguments.context
        self.atoll("new", self.dir, "--data", self.data, "--vocab", 4096, "--preset", arguments.preset, "--tokens", tokens)
        settings = self.dir / "run.toml"
        settings.write_text(re.sub(r"^context = .*", f"context = {arguments.context}", settings.read_text(), count=1, flags=re.M))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        with open(folder / "coordinator.log", "w") as log:
            self.coordinator = subprocess.Popen(
                [self.command, "coordinate", self.dir, "--listen", self.address], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def atoll(self, *words):
        done = subprocess.run([self.command, *map(str, words)], stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(done.stderr)
        return done.stdout.strip()

    def ticket(self):
        return self.atoll("ticket", self.dir, "mine", "--address", self.address)

    def shape(self):
        """The run's model in the words of config.json, as its first snapshot has it."""
        for _ in range(600):
            found = sorted(self.dir.glob("snapshots/*/config.json"))
            if found:
                return json.loads(found[0].read_text())
            time.sleep(0.1)
        sys.exit("the coordinator does not begin:\n" + (self.folder / "coordinator.log").read_text())

    def rows(self):
        """Rows of a batch of held-out text."""
        return int(re.search(r"^rows = (\d+)", (self.dir / "run.toml").read_text(), re.M)[1])

    def end(self):
        self.coordinator.terminate()
        self.coordinator.wait()


def text(folder):
    folder.mkdir()
    for document in range(200):
        (folder / f"{document:03}.txt").write_text(" ".join(random.Random(document).choices(WORDS, k=2000)))
    return folder


def train(arguments, run):
    torch.manual_seed(1)
    shape = run.shape()
    model = atoll.Llama(shape)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    drawn = lambda rows: torch.randint(0, shape["vocab_size"], (rows, arguments.context + 1))
    for _ in range(ALONE_STEPS):
        step(model, optimizer, drawn(arguments.rows))
    with torch.no_grad():
        model(drawn(run.rows())[:, :-1])  # PyTorch keeps memory for products of the size that held-out text has.
    alone_with_spare, alone = anonymous_bytes(), held_bytes()
    engine = atoll.TorchEngine(model, optimizer, parallel="own")  # As Site(ticket, model, optimizer) makes it.
    looks = Stopwatch(engine, "evaluate")
    site = atoll.Site(run.ticket(), engine=engine, data=run.data, dir=run.folder / "site", rows=arguments.rows)
    steps, calls = [], []
    for tokens in site.batches():
        began = time.perf_counter()
        loss = step(model, optimizer, tokens)
        stepped = time.perf_counter()
        looked = looks.seconds
        site.after_step(tokens=tokens[:, 1:].numel(), loss=loss)
        calls.append(time.perf_counter() - stepped - (looks.seconds - looked))
        steps.append(stepped - began)
        if len(steps) == 3 * arguments.steps // 4:
            with_spare, held = anonymous_bytes(), held_bytes()
    first = len(steps) // 4
    steps, calls = steps[first:-1], sorted(calls[first:-1])
    return {
        "machine": f"{os.cpu_count()} cores, {arguments.threads} of them for PyTorch {torch.__version__}",
        "preset": arguments.preset,
        "parameters": parameters,
        "steps": len(steps),
        "step_seconds": statistics.median(steps),
        "call_seconds": statistics.median(calls),
        "call_seconds_95th": calls[int(0.95 * len(calls))],
        "call_seconds_longest": calls[-1],
        "share_between_rounds": statistics.median(calls) / statistics.median(steps),
        "share_of_all_time": sum(calls) / (sum(steps) + sum(calls)),
        "evaluation_seconds": looks.seconds,
        "copies_in_use": (held - alone) / (4 * parameters),
        "copies_with_spare": (with_spare - alone_with_spare) / (4 * parameters),
    }


class Stopwatch:
    """Seconds spent in a method of an object."""

    def __init__(self, of, name):
        self.seconds, self.method = 0.0, getattr(of, name)
        setattr(of, name, self)

    def __call__(self, *arguments):
        began = time.perf_counter()
        try:
            return self.method(*arguments)
        finally:
            self.seconds += time.perf_counter() - began


def step(model, optimizer, tokens):
    loss = functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


def held_bytes():
    """What is in use: the allocator gives back what it keeps for later."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return anonymous_bytes()


def anonymous_bytes():
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))


def show(measured):
    milliseconds = lambda name: f"{1000 * measured[name]:.2f} ms"
    percent = lambda name: f"{100 * measured[name]:.2f} %"
    print(f"{measured['preset']}, {measured['parameters']:,} parameters, {measured['steps']} steps; {measured['machine']}\n")
    for what, value in (
        ("a step without Atoll, median", milliseconds("step_seconds")),
        ("site.after_step, median: between rounds", milliseconds("call_seconds")),
        ("... 95th of 100", milliseconds("call_seconds_95th")),
        ("... longest: weights copied out and changes added", milliseconds("call_seconds_longest")),
        ("share of a step, between rounds", percent("share_between_rounds")),
        ("share of steps and calls together, rounds included", percent("share_of_all_time")),
        ("held-out text, all together", milliseconds("evaluation_seconds")),
        ("memory beyond training alone, in use", f"{measured['copies_in_use']:.1f} copies"),
        ("... with what the allocator keeps", f"{measured['copies_with_spare']:.1f} copies"),
    ):
        print(f"{what:52} {value:>12}")


if __name__ == "__main__":
    main()
