"""The other side of `bench engine` and of `bench/gpu.py`: PyTorch trains the same Llama on the same number of tokens.

    python train.py '{"vocab": 8192, ..., "precision": "bf16", "compiled": true, "threads": 2}'

Every line on standard input is a number of steps to take; the answer is one line of JSON with their seconds.
The model is written as a PyTorch user would who wants speed: fused attention, fused projections,
fused AdamW, and autocast to bf16 over weights that stay fp32, which is what Atoll's engine does too.
"""

import json
import resource
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.keys, self.dim = c["heads"], c["keys"], c["head_dim"]
        d, q, kv, inner = c["d"], self.heads * self.dim, self.keys * self.dim, c["inner"]
        self.widths = (q, kv, kv)
        self.qkv = nn.Linear(d, q + 2 * kv, bias=False)
        self.o = nn.Linear(q, d, bias=False)
        self.gate_up = nn.Linear(d, 2 * inner, bias=False)
        self.down = nn.Linear(inner, d, bias=False)
        self.norm1, self.norm2 = nn.RMSNorm(d, eps=1e-5), nn.RMSNorm(d, eps=1e-5)

    def forward(self, x, cos, sin):
        b, t, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).split(self.widths, dim=-1)
        q = rotate(q.view(b, t, self.heads, self.dim).transpose(1, 2), cos, sin)
        k = rotate(k.view(b, t, self.keys, self.dim).transpose(1, 2), cos, sin)
        v = v.view(b, t, self.keys, self.dim).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).reshape(b, t, -1))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


def rotate(x, cos, sin):
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)


class Llama(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embedding = nn.Embedding(c["vocab"], c["d"])
        self.blocks = nn.ModuleList(Block(c) for _ in range(c["layers"]))
        self.norm = nn.RMSNorm(c["d"], eps=1e-5)
        half = c["head_dim"] // 2
        angles = torch.outer(torch.arange(c["length"]), 10000.0 ** (-torch.arange(half) / half))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens, targets):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = F.linear(self.norm(x), self.embedding.weight)
        return F.cross_entropy(logits.view(-1, logits.size(-1)).float(), targets.reshape(-1))


def main():
    c = json.loads(sys.argv[1])
    device = c.get("device", "cpu")
    if c["threads"]:
        torch.set_num_threads(c["threads"])
    torch.manual_seed(1)
    model = Llama(c).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    forward = torch.compile(model) if c["compiled"] else model
    bf16 = c["precision"] == "bf16"

    def step():
        tokens = torch.randint(c["vocab"], (c["rows"], c["length"] + 1), device=device)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
            loss = forward(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()  # Waits for the device.

    for line in sys.stdin:
        began = time.perf_counter()
        for _ in range(int(line)):
            loss = step()
        seconds = time.perf_counter() - began
        answer = {"seconds": seconds, "loss": loss, "peak_bytes": peak_bytes()}
        if device.startswith("cuda"):
            answer["device_bytes"] = torch.cuda.max_memory_allocated(device)
        print(json.dumps(answer), flush=True)


def peak_bytes():
    """The most memory that this process held at once; `ru_maxrss` would also count whoever started it."""
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


main()
