"""A site of a run inside this process.

    a thread of the core: network, codecs, rounds ──asks──▶ Baton ──▶ engine
                                                     │
                     train: only the thread that owns the Site takes steps; it is handed the baton

The core asks for one inner step at a time. Whoever owns the `Site` takes it, on his own thread, and hands the baton
back; in between the core copies weights out and adds what others have learnt.
"""

import atexit
import logging
import queue
import signal
import threading
from pathlib import Path

from . import align
from ._atoll import AtollError, Starved, Stop, run_site, site_of

log = logging.getLogger("atoll")


def join(ticket, engine, *, data=None, dir=None, rows=None, streams=4):
    """Joins a run and trains with `engine` until the run is finished; True unless the site left it before.

    ticket    what `atoll ticket` printed, or a file that holds it.
    data      text to train on: a file, a folder, or what `atoll ingest` made.
    dir       the site's own folder, for its key and its tokens; without it, `atoll-SITE`.
    rows      samples per micro-batch, if not the run's; all ranks of a site share them.
    streams   data connections to the coordinator; twice as many while the model is fetched.

    Ctrl-C and SIGTERM leave the run after the present step, a second one at once; the same call comes back to it.
    Under torchrun all ranks make this call, and are one site, which the first leaves for all.
    """
    with Site(ticket, engine=engine, data=data, dir=dir, rows=rows, streams=streams) as site, Signals(site):
        try:
            while site.training:
                site.hand_back(step(site, engine))
        except KeyboardInterrupt:
            log.warning("left the run within a step")
    return site.finished


class Signals:
    """Ctrl-C, and SIGTERM by which schedulers and torchrun end a process, leave a run between two steps and not within
    one: the other ranks would wait for the rest of it. They all get the signal, and the first leaves for all."""

    def __init__(self, site):
        self.site, self.came, self.before = site, False, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # Others cannot be interrupted.
            for number in (signal.SIGINT, signal.SIGTERM):
                # What was ignored on purpose, or is not Python's to handle, stays so.
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self.before[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, *_):
        came, self.came = self.came, True
        if came:
            raise KeyboardInterrupt
        log.warning("leaving the run")
        self.site.leave_soon()


def step(site, engine):
    """One step's tokens and loss; an error leaves the run."""
    try:
        return engine.train(1)
    except Starved as starved:
        return starved
    except Exception as error:
        return site.fail(error)


class Site:
    """You drive: a site that counts your own steps.

        with atoll.Site(ticket, model, optimizer, data="texts/") as site:
            for tokens in site.batches():               # (B, T+1), leased: each sample is used exactly once
                loss = ...                              # your forward, backward and optimizer.step()
                site.after_step(tokens=tokens[:, 1:].numel(), loss=loss)

    With `own_batches=True` you take your batches from elsewhere and step `while site.training`. A step then uses up
    as many leases as it would have samples, so shares and learning-rate schedules are right, but the ledger cannot know which
    text it was: that no sample is trained on twice is then yours to see to. `data` is still what the held-out loss
    is measured on. Under torchrun every rank drives, each on its own part of a step.
    """

    def __init__(self, ticket, model=None, optimizer=None, *, engine=None, own_batches=False, data=None, dir=None,
                 rows=None, streams=4, forward=None):
        if engine is None:
            from .engine import TorchEngine

            engine = TorchEngine(model, optimizer, forward=forward, parallel="own")
        self.engine, self.own_batches = engine, own_batches
        ranks = getattr(engine, "ranks", None)
        self.size = ranks.size if ranks else 1
        is_first = ranks is None or ranks.rank == 0
        self.life = Life(engine, self.size, ticket, data, dir, rows, streams) if is_first else Following(engine)
        atexit.register(self.leave)  # Before the interpreter ends.
        self.training = False
        self._await_step()

    @property
    def model(self):
        return self.engine.model

    @property
    def optimizer(self):
        return self.engine.optimizer

    def batches(self):
        """The tokens of one step after the other, (B, T+1) tensors in the host's memory, until the run is finished."""
        while self.training:
            yield self.engine.next_batch().tokens

    def after_step(self, tokens, loss=0.0):
        """Says that a step was taken on so many tokens; takes in what others have learnt. False when the run is over.

        `loss`, the mean per token, is for the operator to see.
        """
        if not self.training:
            raise AtollError("this site is not in its run any more\nhint: step only while site.training")
        if self.own_batches:
            self.engine.next_batch()
        self.hand_back((int(tokens) * self.size, float(loss.detach() if hasattr(loss, "detach") else loss)))
        return self.training

    def hand_back(self, progress):
        """Ends a step; waits until the next may begin, or the run is over."""
        self.training = False
        self.life.hand_back(progress)
        self._await_step()

    def fail(self, error):
        """Leaves the run because of an error, and raises it as the run's."""
        self.training = False
        raise self.life.fail(error) from error

    def leave_soon(self):
        """Leaves the run after the present step."""
        self.life.leave_soon()

    def leave(self):
        """Leaves the run, if it is not finished; what was not contributed goes back."""
        self.training = False
        self.life.leave()
        atexit.unregister(self.leave)

    @property
    def finished(self):
        """Whether the run has reached its goal."""
        return self.life.finished

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        if isinstance(error, Exception) and self.training:
            self.life.fail(error)
        self.leave()

    def _await_step(self):
        self.training = self.life.await_step()


class Life:
    """A site's life in the core, on a thread of its own."""

    def __init__(self, engine, ranks, ticket, data, dir, rows, streams):
        ticket = text_of(ticket)
        options = dict(
            dir=Path(dir) if dir is not None else Path(f"atoll-{site_of(ticket)}"),
            data=None if data is None else Path(data),
            rows=rows,
            threads=getattr(engine, "threads", 1),
            streams=streams,
            device=engine.describe() if hasattr(engine, "describe") else type(engine).__name__,
        )
        self.finished, self.error, self.stop = False, None, Stop()
        self.leader = leader_of(engine) if ranks > 1 else None
        self.baton = Baton(self.leader or engine)
        self.thread = threading.Thread(target=self._live, args=(ticket, options), name="atoll site", daemon=True)
        self.thread.start()

    def await_step(self):
        """Waits for the next step; false if there is none. Raises what ended the site's life."""
        if self.baton.asked.get() is not None:
            return True
        self.thread.join()
        if self.error is not None:
            raise self.error
        return False

    def hand_back(self, progress):
        self.baton.back.put(progress)

    def fail(self, error):
        """Ends because of an error of the owner's; that error as the run's."""
        self.baton.back.put(error)
        self.thread.join()
        return self.error or error

    def leave_soon(self):
        self.stop.set()

    def leave(self):
        self.stop.set()
        self.baton.close()
        self.thread.join()

    def _live(self, ticket, options):
        try:
            self.finished = run_site(ticket, self.baton, self.stop, log.info, **options)
        except BaseException as error:  # It is raised where the site's owner waits.
            self.error = error
        finally:
            try:
                if self.leader is not None:
                    self.leader.end(self.finished, is_heard=not self.baton.is_within_a_step)
            finally:
                self.baton.asked.put(None)


def leader_of(engine):
    from .ranks import Leader  # It needs PyTorch, which not every engine does.

    return Leader(engine)


class Following:
    """The part of a rank that is not the first in its site's life: it does what the first says."""

    def __init__(self, engine):
        from .ranks import Follower

        self.follower = Follower(engine)

    @property
    def finished(self):
        return self.follower.finished

    def await_step(self):
        return self.follower.await_step()

    def hand_back(self, progress):
        """Rank 0 counts the whole site's progress."""

    def fail(self, error):
        """The first rank notices that this one is gone."""
        self.leave()
        return error

    def leave_soon(self):
        """The first rank does, for all."""

    def leave(self):
        """The same as after an error."""
        self.follower.ranks.part()


class Baton:
    """The engine that the core sees. It passes everything on but `train`, which it asks the site's owner for."""

    def __init__(self, engine):
        self.asked, self.back, self.closed = queue.SimpleQueue(), queue.SimpleQueue(), False
        self.is_within_a_step = False
        self.engine, self.announce = engine, getattr(engine, "announce", lambda: None)
        for method in ("staging", "read", "write", "add", "evaluate"):
            setattr(self, method, getattr(engine, method))

    def open(self, run, batches):
        """Opens the engine, and sees that it computes what the run's other engines do."""
        self.engine.open(run, batches)
        align.at_joining(self.engine, run)

    def close(self):
        """Nobody will take a step any more."""
        self.closed = True
        self.back.put(Starved("the site leaves"))

    def train(self, steps):
        tokens, nats = 0, 0.0
        for _ in range(steps):
            if self.closed:
                raise Starved("the site leaves")
            self.is_within_a_step = True
            self.announce()
            self.asked.put(1)
            answer = self.back.get()
            # A feed that had too little was so for all ranks.
            self.is_within_a_step = self.closed or (isinstance(answer, Exception) and not isinstance(answer, Starved))
            if isinstance(answer, Exception):
                raise answer
            tokens, nats = tokens + answer[0], nats + answer[0] * answer[1]
        return tokens, nats / max(tokens, 1)


def text_of(ticket):
    """The ticket's text, which may be in a file."""
    if str(ticket).startswith("atoll1."):
        return str(ticket)
    try:
        return Path(ticket).read_text()
    except OSError as error:
        raise AtollError(f"{ticket} is neither a ticket nor a file with one: {error.strerror}\n"
                         "hint: copy the whole line that `atoll ticket` printed; it starts with atoll1.") from None

