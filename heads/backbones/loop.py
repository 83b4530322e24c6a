"""The gradient loop of a backbone and its heads: epochs, early stop, and states that an interrupted run goes on from.

Every step draws from random numbers that its own number seeds, and batches depend on the epoch alone. So a run that
goes on from a saved state takes the same steps as one that was never interrupted.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from accelerate import Accelerator

from featcache.backbone.checkpoint import Checkpoint, load_state, record, save_state, save_weights
from featcache.backbone.network import Backbone
from featcache.errors import CheckpointError
from featcache.machine.prefetch import prefetch
from featcache.machine.progress import bar, say
from heads.backbones.batches import Images, plan_steps
from heads.backbones.encoder import Encoder
from heads.backbones.learner import Learner
from heads.backbones.scoring import HeldOut
from heads.backbones.step import Gradients, Group
from heads.config import TrainConfig

_PREFETCHED = 2  # steps whose images and responses are read before they are asked for


class EncoderTraining:
    """One run: a fold of one stage. `train` returns its finished checkpoint.

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

    def train(self) -> Checkpoint:
        """Train until the last epoch, or until the score has stopped rising; returns the finished checkpoint."""
        epoch, step = self._resume()
        while not self._checkpoint.finished:
            self.run_epoch(epoch, step)
            epoch, step = epoch + 1, 0
            self._end_epoch(epoch, self._score())
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
                    self._record(state=self._save_state(epoch, step + 1))

    def _step(self, groups: Sequence[Group], number: int) -> None:
        """Change the weights once; steps are numbered from 0 over all epochs."""
        loss, norm = self._gradients.compute(groups, number)
        self._refuse_divergence("loss", loss, number)
        if self._accelerator.scaler is None:  # a scaler skips a step without a finite gradient, and scales down
            self._refuse_divergence("gradient", norm, number)
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
            kept = self._save_weights(epoch) | {"epoch": epoch, "score": score}
        state = None if enough else self._save_state(epoch, 0)
        self._record(**kept, scores=scores, state=state, finished=enough)
        mark = " (chosen on)" if self._config.stop == "fold" else ""
        say(f"{label}: epoch {epoch} scores {score:.4f} on fold {self._checkpoint.fold}{mark}")

    def _save_weights(self, epoch: int) -> dict[str, Any]:
        """Write what the epoch ended with; returns what the checkpoint then knows of its files."""
        folder, encoder = f"epoch-{epoch:03d}", self._learner.scored
        if not self._accelerator.is_main_process:
            return {"weights": folder}
        digests = save_weights(self._checkpoint.path / folder, encoder.backbone.state_dict(), encoder.heads.saved())
        return {"weights": folder, "digests": digests}

    def _save_state(self, epoch: int, step: int) -> str:
        """Write what a later run goes on from, at a step of an epoch, both from 0; returns the name of its folder."""
        folder = f"state-{epoch:03d}-{step:06d}"
        if self._accelerator.is_main_process:
            save_state(self._checkpoint.path / folder, {"epoch": epoch, "step": step, **self._learner.state()})
        return folder

    def _resume(self) -> tuple[int, int]:
        """Load the state that an earlier run left, if any; returns the epoch and its step to go on from."""
        facts = self._checkpoint.facts
        if not facts.state:
            return 0, 0
        state = load_state(self._checkpoint.path / facts.state)
        self._learner.load(state)
        say(f"{facts.label}: goes on after epoch {state['epoch']}, step {state['step']}")
        return state["epoch"], state["step"]

    def _record(self, **facts: Any) -> None:
        """Describe the checkpoint anew, with these facts; the files that it names must be there."""
        self._checkpoint = replace(self._checkpoint, facts=replace(self._checkpoint.facts, **facts))
        if self._accelerator.is_main_process:
            record(self._checkpoint)
        self._accelerator.wait_for_everyone()

    def _refuse_divergence(self, what: str, value: float, number: int) -> None:
        if math.isfinite(value):
            return
        facts, path = self._checkpoint.facts, self._checkpoint.path
        kept = f"epoch {facts.epoch} is kept in {path}" if facts.weights else "none was saved"
        epoch, step = divmod(number, self._per_epoch)
        raise CheckpointError(
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
