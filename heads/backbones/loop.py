"""The gradient loop of a backbone and its heads: epochs, early stop, and states that an interrupted run goes on from.

Every step draws from random numbers that its own number seeds, and batches depend on the epoch alone. So a run that
goes on from a saved state takes the same steps as one that was never interrupted.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils._pytree import tree_flatten, tree_unflatten

from featcache.backbone.checkpoint import Checkpoint, load_state, record, save_state, save_weights
from featcache.backbone.network import Backbone
from featcache.errors import CheckpointError
from featcache.machine.background import Background
from featcache.machine.device import to_host
from featcache.machine.prefetch import prefetch
from featcache.machine.progress import bar, say
from heads.backbones.batches import Images, plan_steps
from heads.backbones.encoder import Encoder
from heads.backbones.learner import Learner
from heads.backbones.scoring import HeldOut
from heads.backbones.step import Gradients, Group
from heads.config import TrainConfig

_PREFETCHED = 2  # steps whose images and responses are read before they are asked for
READ_EVERY = 16  # steps on an accelerator after which their losses are read: reading waits for it


class EncoderTraining:
    """One run: a fold of one stage. `train` returns its finished checkpoint.

    On an accelerator, files are written beside the training, from copies in main memory.

    Parameters
    ----------
    backbone : what the encoder's backbone was made from, for its transform
    checkpoint : where states and weights go, with its key and what is known before training
    save_every : steps between saved states, besides those after each epoch; 0: none
    """

    def __init__(
        self,
        encoder: Encoder,
        backbone: Backbone,
        images: Images,
        config: TrainConfig,
        accelerator: Accelerator,
        checkpoint: Checkpoint,
        save_every: int = 0,
    ) -> None:
        self._images, self._config, self._save_every = images, config, save_every
        self._accelerator, self._checkpoint = accelerator, checkpoint
        self._steps = plan_steps(config, accelerator.num_processes, [len(rows) for rows in images.train_rows])
        self._by_subject = config.batches == "subject"
        self._per_epoch = images.n_steps(self._steps.images, self._by_subject)
        self._learner = Learner(encoder, config, accelerator, self._per_epoch)
        self._gradients = Gradients(self._learner, backbone, images, config, self._steps)
        self._held_out = HeldOut(images, backbone, config.batch_size, accelerator)
        self._accelerated = accelerator.device.type != "cpu"
        self._read_every = READ_EVERY if self._accelerated else 1
        self._unread: list[tuple[int, torch.Tensor]] = []  # number of a step, its loss and its gradient's norm
        self._writing: Background[Checkpoint] = Background(self._accelerated)

    def train(self) -> Checkpoint:
        """Train until the last epoch, or until the score has stopped rising; returns the finished checkpoint."""
        epoch, step = self._resume()
        try:
            while not self._checkpoint.finished:
                self.run_epoch(epoch, step)
                epoch, step = epoch + 1, 0
                self._end_epoch(epoch, self._score())
        finally:
            self._wait_for_files()
        self._accelerator.wait_for_everyone()
        self._accelerator.free_memory()
        return self._checkpoint

    def run_epoch(self, epoch: int, first: int = 0) -> None:
        """Train on every image once, from step `first` of the epoch on; neither scores nor keeps the epoch."""
        plan = self._images.epoch(self._config.seed, epoch, self._steps.images, self._by_subject)
        label = f"{self._checkpoint.facts.label} epoch {epoch + 1}/{self._config.epochs}"
        self._learner.train_mode()
        with bar(label, len(plan) * self._steps.images, "images", first * self._steps.images) as advance:
            for step, groups in enumerate(prefetch(self._gradients.read, plan[first:], _PREFETCHED), first):
                number = epoch * self._per_epoch + step
                self._step(groups, number)
                advance(self._steps.images)
                last = step == len(plan) - 1
                if self._save_every and (number + 1) % self._save_every == 0 and not last:
                    self._save((epoch, step + 1))
        self._refuse_divergence()

    def _step(self, groups: Sequence[Group], number: int) -> None:
        """Change the weights once; steps are numbered from 0 over all epochs."""
        self._unread.append((number, self._gradients.compute(groups, number)))
        if len(self._unread) >= self._read_every:
            self._refuse_divergence()
        self._learner.update(number)

    def _score(self) -> float:
        self._learner.share_statistics()
        return self._held_out.score(self._learner.scored)

    def _end_epoch(self, epoch: int, score: float) -> None:
        """Keep the epoch if it is the best or if the last is wanted, and save where the run goes on, if it does."""
        label, scores = self._checkpoint.facts.label, (*self._checkpoint.facts.scores, score)
        enough = is_enough(scores, self._config)
        kept = {}
        if self._config.stop == "never" or score >= max(scores):
            kept = {"weights": f"epoch-{epoch:03d}", "epoch": epoch, "score": score}
        self._save(None if enough else (epoch, 0), **kept, scores=scores, finished=enough)
        mark = " (chosen on)" if self._config.stop == "fold" else ""
        say(f"{label}: epoch {epoch} scores {score:.4f} on fold {self._checkpoint.fold}{mark}")

    def _save(self, position: tuple[int, int] | None, **facts: Any) -> None:
        """Write what a later run goes on from, and describe the checkpoint anew, with these facts.

        position : epoch and step, both from 0, that the run has come to; None: it is finished
        facts : with `weights`, the name of a folder, the weights of now are written there
        """
        self._refuse_divergence()
        self._wait_for_files()
        learner, scored, main = self._learner, self._learner.scored, self._accelerator.is_main_process
        state = None if position is None else f"state-{position[0]:03d}-{position[1]:06d}"
        self._checkpoint = replace(self._checkpoint, facts=replace(self._checkpoint.facts, **facts, state=state))
        if main:
            weights = (scored.backbone.state_dict(), scored.heads.saved()) if "weights" in facts else None
            whole = None if position is None else {"epoch": position[0], "step": position[1], **learner.state()}
            copied = _in_main_memory((weights, whole), own=self._accelerated)
            self._writing.start(partial(_write, self._checkpoint, copied))
        self._accelerator.wait_for_everyone()

    def _wait_for_files(self) -> None:
        """Wait until what was saved last is on the disk, and know what was written."""
        self._checkpoint = self._writing.wait() or self._checkpoint

    def _resume(self) -> tuple[int, int]:
        """Load the state that an earlier run left, if any; returns the epoch and its step to go on from."""
        facts = self._checkpoint.facts
        if not facts.state:
            return 0, 0
        state = load_state(self._checkpoint.path / facts.state)
        self._learner.load(state)
        say(f"{facts.label}: goes on after epoch {state['epoch']}, step {state['step']}")
        return state["epoch"], state["step"]

    def _refuse_divergence(self) -> None:
        """Raise CheckpointError for the first step since the last call whose loss or gradient is not finite.

        It is called before anything is saved. An accelerator may have taken more steps by then; they are forgotten.
        """
        unread, self._unread = self._unread, []
        if not unread:
            return
        values = torch.stack([one for _, one in unread]).tolist()
        # a scaler skips a step without a finite gradient, and scales down
        names = ("loss", "gradient")[: 1 if self._accelerator.scaler is not None else 2]
        for (number, _), of_step in zip(unread, values, strict=True):
            for name, value in zip(names, of_step, strict=False):
                if not np.isfinite(value):
                    raise self._diverged(name, value, number)

    def _diverged(self, what: str, value: float, number: int) -> CheckpointError:
        facts, path = self._checkpoint.facts, self._checkpoint.path
        kept = f"epoch {facts.epoch} is kept in {path}" if facts.weights else "none was saved"
        epoch, step = divmod(number, self._per_epoch)
        return CheckpointError(
            facts.label,
            expected=f"a finite {what}",
            found=f"{value} at epoch {epoch + 1}, step {step + 1} of {self._per_epoch}",
            remedy=f"{kept}; lower --learning-rate, or use --precision float32 or --clip-norm 1",
        )


def is_enough(scores: Sequence[float], config: TrainConfig) -> bool:
    """Whether the last epoch is over, or the score has not risen for as many epochs as `patience` says."""
    waited = len(scores) - 1 - int(np.argmax(scores))
    stopped = config.stop == "fold" and waited >= config.patience
    return stopped or len(scores) == config.epochs


def _in_main_memory(tree: Any, own: bool) -> Callable[[], Any]:
    """Start copies of a device's tensors in nested dicts, and return the function that gives the same with the copies.

    own : whether tensors that are in main memory are copied too, because training goes on
    """
    leaves, structure = tree_flatten(tree)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    copies = to_host([one.clone() if own and one.device.type == "cpu" else one for one in tensors])

    def copied() -> Any:
        there = iter(copies())
        return tree_unflatten([next(there) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], structure)

    return copied


def _write(checkpoint: Checkpoint, copied: Callable[[], Any]) -> Checkpoint:
    """Write the weights and the state that a checkpoint names, then its description; returns it with their digests.

    copied : gives (backbone's and heads' tensors, state); None of either: there is none to write
    """
    weights, state = copied()
    if weights is not None:
        digests = save_weights(checkpoint.path / str(checkpoint.facts.weights), *weights)
        checkpoint = replace(checkpoint, facts=replace(checkpoint.facts, digests=digests))
    if state is not None:
        save_state(checkpoint.path / str(checkpoint.facts.state), state)
    record(checkpoint)
    return checkpoint
