"""A callback for `transformers.Trainer`, so that recipes built on it (TRL, LLaMA-Factory) join a run with one argument:

    Trainer(model, …, callbacks=[atoll.AtollCallback("atoll1.…", data="texts/")])

The Trainer's own batches and optimizer train; see `own_batches` of `Site` for what the ledger then means.
"""

from .site import Site

try:
    from transformers import TrainerCallback
except ImportError:  # Whoever has a Trainer has transformers.
    TrainerCallback = object


class AtollCallback(TrainerCallback):
    """Joins when training begins, counts the Trainer's steps, and ends training when the run is finished."""

    def __init__(self, ticket, **options):
        self.ticket, self.options, self.site = ticket, options, None
        self.tokens, self.loss = 0, 0.0

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **_):
        rows = args.per_device_train_batch_size * getattr(args, "world_size", 1)  # Of all ranks.
        options = dict(rows=rows, own_batches=True) | self.options
        self.site = Site(self.ticket, unwrapped(model), optimizer, **options)

    def on_step_end(self, args, state, control, **_):
        training = self.site.engine.run.training
        tokens = args.per_device_train_batch_size * args.gradient_accumulation_steps * training["context"]
        if not self.site.after_step(tokens=tokens, loss=self.loss):
            control.should_training_stop = True
        return control

    def on_log(self, args, state, control, logs=None, **_):
        self.loss = (logs or {}).get("loss", self.loss)

    def on_train_end(self, args, state, control, **_):
        self.site.leave()


def unwrapped(model):
    """The model inside accelerate's and DDP's wrappers."""
    return model.module if hasattr(model, "module") else model
