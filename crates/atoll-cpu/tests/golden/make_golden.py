"""Writes the golden numbers that the engine is compared with: what Hugging Face's Llama and PyTorch's
AdamW and Muon make of tiny random models, in fp32, on one thread.

    python make_golden.py

For each model, NAME.safetensors holds `weight.*`, `gradient.*`, `tokens`, `logits`, and NAME.json holds
the configuration, the loss, and a short training: losses, and two checksums of every tensor
at its end.
"""

import inspect
import json
import math
from pathlib import Path

import torch
import torch.optim._muon
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

SHAPE = dict(
    vocab_size=80,
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=4,
    head_dim=8,
    max_position_embeddings=24,
    rms_norm_eps=1e-5,
)
MODELS = {
    "tied": dict(num_key_value_heads=2, rope_theta=10000.0, tie_word_embeddings=True),
    "untied": dict(num_key_value_heads=1, rope_theta=500.0, tie_word_embeddings=False),
}
MODELS["muon"] = MODELS["tied"]
ROWS, LENGTH, STEPS = 3, 23, 8
OPTIMIZER = dict(
    learning_rate=3e-3,
    beta1=0.9,
    beta2=0.95,
    eps=1e-8,
    weight_decay=0.1,
    clip_norm=0.5,
    warmup_steps=4,
    final_share=0.1,
)
MUON = dict(learning_rate=2e-3, momentum=0.9, nesterov=True, iterations=5, weight_decay=0.05)

# PyTorch orthogonalizes in bf16; the numbers here are to say more about the algorithm than about rounding.
source = inspect.getsource(torch.optim._muon._zeropower_via_newtonschulz)
exec(source.replace("torch.bfloat16", "torch.float32"), vars(torch.optim._muon))


def random_model(shape, seed):
    """A model whose gains and matrices are all far from special values."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**shape, attn_implementation="eager", use_cache=False)).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.0, 0.2) if weight.dim() == 1 else weight.normal_(0.0, 0.15)
    return model


def loss_of(model, tokens):
    logits = model(tokens[:, :-1]).logits
    return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def schedule(step, progress):
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    share = OPTIMIZER["final_share"]
    return (share + (1 - share) * cosine) * min(1.0, (step + 1) / OPTIMIZER["warmup_steps"])


def optimizers(model, muon):
    """AdamW, and if wanted Muon for the matrices of the layers, with the learning rate of each."""
    matrices = [p for name, p in model.named_parameters() if muon and "layers" in name and p.dim() > 1]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    decayed = [p for p in others if p.dim() > 1]
    plain = [p for p in others if p.dim() == 1]
    groups = [dict(params=decayed, weight_decay=OPTIMIZER["weight_decay"]), dict(params=plain, weight_decay=0.0)]
    betas = (OPTIMIZER["beta1"], OPTIMIZER["beta2"])
    adamw = torch.optim.AdamW(groups, lr=OPTIMIZER["learning_rate"], betas=betas, eps=OPTIMIZER["eps"])
    if not muon:
        return [(adamw, OPTIMIZER["learning_rate"])]
    muon = torch.optim.Muon(
        matrices,
        lr=MUON["learning_rate"],
        weight_decay=MUON["weight_decay"],
        momentum=MUON["momentum"],
        nesterov=MUON["nesterov"],
        ns_steps=MUON["iterations"],
        adjust_lr_fn="match_rms_adamw",
    )
    return [(adamw, OPTIMIZER["learning_rate"]), (muon, MUON["learning_rate"])]


def train(model, batches, muon):
    """Clipped steps; step i of n is at progress i / n. Returns the loss before each step."""
    pairs = optimizers(model, muon)
    losses, norms = [], []
    for step, tokens in enumerate(batches):
        _, loss = loss_of(model, tokens)
        model.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER["clip_norm"]).item())
        for optimizer, rate in pairs:
            for group in optimizer.param_groups:
                group["lr"] = rate * schedule(step, step / len(batches))
            optimizer.step()
        losses.append(loss.item())
    return losses, norms


def projection(weight):
    """One number that every element moves: the sum of w_i cos(i)."""
    flat = weight.double().flatten()
    return (flat * torch.arange(len(flat)).double().cos()).sum().item()


def write(folder, name, special, seed):
    shape = SHAPE | special
    model = random_model(shape, seed)
    tokens = torch.randint(0, shape["vocab_size"], (STEPS, ROWS, LENGTH + 1))
    logits, loss = loss_of(model, tokens[0])
    loss.backward()
    tensors = {"tokens": tokens.int(), "logits": logits.detach()}
    for key, weight in model.named_parameters():
        tensors["weight." + key] = weight.detach().clone()
        tensors["gradient." + key] = weight.grad.clone()
    save_file(tensors, folder / f"{name}.safetensors")
    losses, norms = train(model, tokens, name == "muon")
    numbers = dict(
        model=shape,
        optimizer=OPTIMIZER,
        muon=MUON if name == "muon" else None,
        rows=ROWS,
        length=LENGTH,
        loss=loss.item(),
        losses=losses,
        gradient_norms=norms,
        final_norms={key: weight.detach().double().norm().item() for key, weight in model.named_parameters()},
        final_projections={key: projection(weight.detach()) for key, weight in model.named_parameters()},
    )
    (folder / f"{name}.json").write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for seed, (name, special) in enumerate(MODELS.items()):
        write(Path(__file__).parent, name, special, seed + 1)
