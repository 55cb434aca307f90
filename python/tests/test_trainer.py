"""The Trainer's callback, driven as transformers drives it."""

from types import SimpleNamespace

import atoll
import torch
from torch.nn import functional


def test_a_trainer_joins_with_one_argument(lab):
    lab = lab(20_000)
    coordinator = lab.coordinate()
    model = atoll.Llama(lab.shape())
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    callback = atoll.AtollCallback(lab.ticket("trainer"), **lab.options("trainer"))
    args = SimpleNamespace(per_device_train_batch_size=4, gradient_accumulation_steps=1)
    state, control = SimpleNamespace(), SimpleNamespace(should_training_stop=False)
    callback.on_train_begin(args, state, control, model=model, optimizer=optimizer)
    while not control.should_training_stop:
        tokens = torch.randint(0, 300, (4, 33))
        loss = functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        callback.on_log(args, state, control, logs={"loss": loss.item()})
        callback.on_step_end(args, state, control)
    callback.on_train_end(args, state, control)
    assert callback.site.finished and coordinator.wait() == 0
