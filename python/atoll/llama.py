"""A Llama in plain PyTorch, with the names of Hugging Face's, for sites that do not bring their own model.

RMSNorm, rotary embedding that turns halves (not neighbours), grouped-query attention, SwiGLU. `LlamaForCausalLM` of
transformers is the same function of the same tensors.
"""

import math

import torch
from torch import nn
from torch.nn import functional


class Llama(nn.Module):
    """The model that `config`, the words of config.json as a dict, describes. Returns logits."""

    def __init__(self, config):
        super().__init__()
        self.config = dict(config)
        self.model = Body(config)
        self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)
        if config["tie_word_embeddings"]:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.apply(self._first_weights)

    def _first_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, tokens, mask=None):
        """`tokens` (B, T); `mask` (B, T, T) is True where a token may see another, by default all before it."""
        return self.lm_head(self.model(tokens, mask))


class Body(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))
        self.norm = RMSNorm(config["hidden_size"], config["rms_norm_eps"])

    def forward(self, tokens, mask=None):
        if mask is None:
            mask = causal(tokens.shape[1], tokens.device)
        hidden = self.embed_tokens(tokens)
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return self.norm(hidden)


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.post_attention_layernorm = RMSNorm(config["hidden_size"], config["rms_norm_eps"])

    def forward(self, hidden, mask):
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), mask)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, self.dim, self.theta = config["hidden_size"], config["head_dim"], config["rope_theta"]
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.q_proj = nn.Linear(width, self.heads * self.dim, bias=False)
        self.k_proj = nn.Linear(width, self.kv_heads * self.dim, bias=False)
        self.v_proj = nn.Linear(width, self.kv_heads * self.dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.dim, width, bias=False)

    def forward(self, x, mask):
        rows, length, _ = x.shape
        split = lambda y, heads: y.view(rows, length, heads, self.dim).transpose(1, 2)  # (B, H, T, d)
        cos, sin = angles(length, self.dim, self.theta, x.device)
        q = turned(split(self.q_proj(x), self.heads), cos, sin)
        k = turned(split(self.k_proj(x), self.kv_heads), cos, sin)
        v = split(self.v_proj(x), self.kv_heads)
        group = self.heads // self.kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        return self.o_proj(attend(q, k, v, mask).transpose(1, 2).reshape(rows, length, -1))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, inner = config["hidden_size"], config["intermediate_size"]
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x):
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


def causal(length, device):
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()[None]


def angles(length, dim, theta, device):
    """Cosines and sines, (T, d), of every position's turn."""
    rates = theta ** (-torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
    turns = torch.arange(length, dtype=torch.float32, device=device)[:, None] * rates
    turns = torch.cat([turns, turns], -1)
    return turns.cos(), turns.sin()


def turned(x, cos, sin):
    """Rotates element i of a head together with element i + d/2."""
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)


def attend(q, k, v, mask):
    """Attention; PyTorch's fused one where there is one."""
    if hasattr(functional, "scaled_dot_product_attention"):
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
    scores = (q @ k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~mask[:, None], float("-inf"))
    return scores.softmax(-1).to(v.dtype) @ v
