"""The gradient loop of a backbone and its heads: batches, loss, optimiser, schedule, early stop, states to go on from.

Every step draws from random numbers that its own number seeds, and batches depend on the epoch alone; so a run that
goes on from a saved state takes the same steps as one that was never interrupted.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, broadcast, gather_object
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn
from torchvision.transforms import v2

from featcache.backbone.checkpoint import Checkpoint, load_state, record, save_state, save_weights
from featcache.backbone.network import Backbone
from featcache.dataset.rois import HEMISPHERES
from featcache.errors import CheckpointError, ConfigError
from featcache.machine.prefetch import prefetch
from featcache.machine.progress import bar, say
from heads.backbones.batches import Images, Targets, plan_steps
from heads.backbones.encoder import Encoder, encoder_loss
from heads.modules.by_subject import SpatialHeads
from heads.config import TrainConfig
from heads.scores.metrics import VertexScores, pearson_r, summarize

_AHEAD = 2  # steps whose images and responses are read before they are asked for
_MIXED = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}  # accelerate's names


def make_accelerator(precision: str, device: str, every_weight: bool = True) -> Accelerator:
    """accelerate's view of this process: its device, its fellow processes and its precision.

    every_weight : whether each pass uses all weights; where not, processes look for those that wait for no gradient
    """
    if precision == "float16" and device == "cpu":
        raise ConfigError(
            "--precision float16", expected="a CUDA device", found="the CPU", remedy="use bfloat16 or float32"
        )
    AcceleratorState._reset_state()  # it is one for the whole process, and refuses another precision in a later run
    # the others wait while one of them decodes every image, or fits the heads to start from
    patient = InitProcessGroupKwargs(timeout=timedelta(days=1))
    exchange = DistributedDataParallelKwargs(find_unused_parameters=not every_weight)
    return Accelerator(cpu=device == "cpu", mixed_precision=_MIXED[precision], kwargs_handlers=[patient, exchange])


@dataclass(frozen=True)
class HeldOut:
    """What scores an encoder on the fold that is held out from it.

    backbone : what the encoder's backbone was made from, for its transform
    batch_size : images a pass; sums inside a network depend on it in their last bits
    """

    images: Images
    backbone: Backbone
    batch_size: int
    accelerator: Accelerator

    def score(self, encoder: Encoder) -> float:
        """The challenge's metric of the held-out fold as a fraction, or mean r without ceilings.

        Over the vertices of all subjects together; processes share the images.
        """
        scores = []
        for number, (subject, rows) in enumerate(zip(self.images.subjects, self.images.held_out, strict=True)):
            own = np.array_split(rows, self.accelerator.num_processes)[self.accelerator.process_index]
            predicted = self.predict(encoder, number, own)
            for hemisphere in HEMISPHERES:
                everything = np.concatenate(gather_object([predicted[hemisphere]]))
                r = pearson_r(everything, subject.responses(hemisphere)[rows])
                scores.append(VertexScores(subject.name, hemisphere, r, subject.noise_ceiling[hemisphere]))
        overall = summarize(scores)[-1]
        return overall.mean_r if overall.accuracy is None else overall.accuracy / 100

    def predict(self, encoder: Encoder, number: int, rows: np.ndarray) -> dict[str, np.ndarray]:
        """{hemisphere: (len(rows), n_vertices)} of one subject's images, by the encoder in evaluation."""
        encoder.eval()
        device, name = self.accelerator.device, self.images.subjects[number].name
        columns = {hemisphere: encoder.heads.columns[name, hemisphere].to(device) for hemisphere in HEMISPHERES}
        found = {h: [np.empty((0, len(index)), dtype=np.float32)] for h, index in columns.items()}
        batches = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        with torch.inference_mode():
            for batch in batches:
                pairs = np.stack([np.full(len(batch), number), batch], 1)
                images = self.backbone.normalise(self.images.read(pairs).to(device))
                subjects = torch.full((len(batch),), number, device=device)
                outputs = encoder(images, subjects)
                for hemisphere, index in columns.items():
                    found[hemisphere].append(outputs[:, index].float().cpu().numpy())
        return {hemisphere: np.concatenate(parts) for hemisphere, parts in found.items()}


class EncoderTraining:
    """One run: a fold of one stage. `train` returns its finished checkpoint.

    backbone : what the encoder's backbone was made from, for its transform
    checkpoint : where states and weights go, with the key and the facts known before training
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
        self._images, self._backbone, self._config, self._save_every = images, backbone, config, save_every
        self._accelerator, self._checkpoint, self._device = accelerator, checkpoint, str(accelerator.device)
        self._steps = plan_steps(config, accelerator.num_processes, len(images))
        self._per_epoch = len(images) // self._steps.images
        encoder.to(self._device)
        self._ema = ModelEmaV3(encoder, config.ema, use_warmup=True) if config.ema else None
        optimiser = torch.optim.AdamW(parameter_groups(encoder, config), lr=config.learning_rate)
        total = config.epochs * self._per_epoch
        warmup = round(config.warmup * self._per_epoch)
        # of 2 steps or more: timm warns of a cosine of one, and the first step of a longer one is the same
        self._schedule = CosineLRScheduler(optimiser, max(total, 2), warmup_t=warmup, t_in_epochs=False)
        self._model, self._optimiser = accelerator.prepare(encoder, optimiser)
        self._columns = {key: index.to(self._device) for key, index in encoder.heads.columns.items()}
        self._ceilings = {
            (subject.name, h): None if (c := subject.noise_ceiling[h]) is None else torch.tensor(c, device=self._device)
            for subject in images.subjects
            for h in HEMISPHERES
        }
        self._augment = _augmentation() if config.augment else None
        self._held_out = HeldOut(images, backbone, config.batch_size, accelerator)

    def train(self) -> Checkpoint:
        epoch, step = self._resume()
        while not self._checkpoint.finished:
            self.run_epoch(epoch, step)
            epoch, step = epoch + 1, 0
            self._end_epoch(epoch)
        self._accelerator.free_memory()
        return self._checkpoint

    def _is_enough(self, scores: Sequence[float]) -> bool:
        """Whether the last epoch is over, or the score has stopped rising."""
        waited = len(scores) - 1 - int(np.argmax(scores))
        stopped = self._config.stop == "fold" and waited >= self._config.patience
        return stopped or len(scores) == self._config.epochs

    def run_epoch(self, epoch: int, first: int = 0) -> None:
        """Train on every image once, from a step on; neither scores nor saves the epoch."""
        plan = self._images.epoch(self._config.seed, epoch, self._steps.images)
        label = f"{self._checkpoint.facts['label']} epoch {epoch + 1}/{self._config.epochs}"
        _train_mode(self._model, self._config.freeze_norm)
        total, number = len(plan) * self._steps.images, epoch * self._per_epoch + first
        with bar(label, total, "images", first * self._steps.images) as advance:
            for groups in prefetch(self._read, plan[first:], _AHEAD):
                self._step(groups, number)
                number += 1
                advance(self._steps.images)
                done = number - epoch * self._per_epoch
                if self._save_every and number % self._save_every == 0 and done < len(plan):
                    self._record(state=self._save_state(epoch, done))

    def _read(self, pairs: np.ndarray) -> list[tuple[list[tuple[torch.Tensor, torch.Tensor]], list[Targets]]]:
        """For each group of a step: this device's batches (pixels, subjects), and the responses to compare with."""
        own, read = self._accelerator.process_index, []
        for group in self._steps.groups(pairs):
            batches = [(self._images.read(batch), torch.from_numpy(batch[:, 0].copy())) for batch in group[own]]
            seen = group if self._steps.group else group[own]
            read.append((batches, self._images.targets(seen.reshape(-1, 2))))
        # groups are of all devices when they are gathered; otherwise each device has taken its own batch of each
        return read

    def _step(self, groups: list, number: int) -> None:
        config, accelerator = self._config, self._accelerator
        torch.manual_seed(hash((config.seed, number, accelerator.process_index)) % 2**63)
        self._schedule.step_update(number)
        self._optimiser.zero_grad()
        losses = []
        for k, (batches, targets) in enumerate(groups):
            moved = [(self._ready(pixels), subjects.to(self._device)) for pixels, subjects in batches]
            near = [replace(t, responses=t.responses.to(self._device, non_blocking=True)) for t in targets]
            backward = self._backward_gathered if self._steps.group else self._backward
            losses.append(backward(moved, near, len(groups), last=k == len(groups) - 1))
        loss = float(accelerator.reduce(torch.stack(losses).mean(), "mean")) + self._regularise()
        if not math.isfinite(loss):
            raise self._diverged("loss", loss, number)
        norm = float(accelerator.clip_grad_norm_(self._model.parameters(), config.clip_norm or math.inf))
        if accelerator.scaler is None and not math.isfinite(norm):  # a scaler skips such a step and scales down
            raise self._diverged("gradient", norm, number)
        self._optimiser.step()
        if self._ema is not None:
            self._share_statistics()
            self._ema.update(accelerator.unwrap_model(self._model), number)

    def _regularise(self) -> float:
        """Add the gradient of what the heads' maps cost, once a step, and alike in every process."""
        heads = self._accelerator.unwrap_model(self._model).heads
        if not (isinstance(heads, SpatialHeads) and (self._config.smoothness or self._config.sparsity)):
            return 0.0
        cost, scaler = heads.regularisation(), self._accelerator.scaler
        weights = list(heads.parameters())
        # not by `backward`, which would tell whatever exchanges gradients that these are ready a second time
        gradients = torch.autograd.grad(cost if scaler is None else scaler.scale(cost), weights, allow_unused=True)
        for weight, gradient in zip(weights, gradients, strict=True):
            if gradient is not None:
                weight.grad = gradient if weight.grad is None else weight.grad + gradient
        return float(cost.detach())

    def _share_statistics(self) -> None:
        """Give every process the running statistics of the first, as the next forward pass would."""
        for buffer in self._accelerator.unwrap_model(self._model).buffers():
            broadcast(buffer)

    def _ready(self, pixels: torch.Tensor) -> torch.Tensor:
        pixels = pixels.to(self._device, non_blocking=True)
        if self._augment is not None:
            pixels = torch.stack([self._augment(image) for image in pixels])
        return self._backbone.normalise(pixels).contiguous(memory_format=torch.channels_last)

    def _loss(self, outputs: torch.Tensor, targets: Sequence[Targets]) -> torch.Tensor:
        return encoder_loss(self._config.terms, outputs, targets, self._columns, self._ceilings)

    def _backward(self, batches: list, targets: Sequence[Targets], n_groups: int, last: bool) -> torch.Tensor:
        """Each batch alone."""
        ((images, subjects),) = batches
        with self._synchronised(last):
            loss = self._loss(self._model(images, subjects), targets)
            self._accelerator.backward(loss / n_groups)
        return loss.detach()

    def _backward_gathered(self, batches: list, targets: Sequence[Targets], n_groups: int, last: bool) -> torch.Tensor:
        """The gradient of a loss over all batches of a group and all devices, with one batch's graph in memory.

        Predictions are gathered first, the loss is differentiated with respect to them, and each batch runs again to
        carry its part of that back into the weights (Gao et al. 2021, https://arxiv.org/abs/2101.06983). The second
        run repeats the random numbers of the first, and the first leaves running statistics alone.
        """
        devices, own = self._accelerator.num_processes, self._accelerator.process_index
        states, outputs = [], []
        with torch.no_grad(), _still_statistics(self._model):
            for images, subjects in batches:
                states.append(_random_state(self._device))
                outputs.append(self._model(images, subjects).float())
        everything = self._accelerator.gather(torch.stack(outputs)).flatten(0, 1).requires_grad_()
        loss = self._loss(everything, targets)
        (gradient,) = torch.autograd.grad(loss, everything)
        # processes average their gradients, but here each has only its own part of the sum
        parts = gradient.reshape(devices, len(batches), -1, gradient.shape[1])[own] * devices / n_groups
        for k, ((images, subjects), state, part) in enumerate(zip(batches, states, parts, strict=True)):
            _set_random_state(self._device, state)
            with self._synchronised(last and k == len(batches) - 1):
                self._accelerator.backward(self._model(images, subjects), gradient=part)
        return loss.detach()

    @contextmanager
    def _synchronised(self, last: bool) -> Iterator[None]:
        """Processes exchange gradients once a step, in its last backward pass."""
        if last:
            yield
        else:
            with self._accelerator.no_sync(self._model):
                yield

    def _end_epoch(self, epoch: int) -> None:
        self._share_statistics()
        encoder = self._scored()
        score = self._score(encoder)
        facts = self._checkpoint.facts
        scores = [*facts["scores"], score]
        if self._config.stop == "never" or score >= max(scores):
            folder = f"epoch-{epoch:03d}"
            if self._accelerator.is_main_process:
                backbone = {key: value for key, value in encoder.backbone.state_dict().items()}
                written = save_weights(self._checkpoint.path / folder, backbone, encoder.heads.saved())
                facts = {**facts, "digests": written}
            facts = {**facts, "weights": folder, "epoch": epoch, "score": score}
        enough = self._is_enough(scores)
        state = None if enough else self._save_state(epoch, 0)
        self._record(**{**facts, "scores": scores, "state": state, "finished": enough})
        say(f"{facts['label']}: epoch {epoch} scores {score:.4f} on fold {self._checkpoint.fold['fold']}")

    def _scored(self) -> Encoder:
        """The weights that are scored and saved."""
        return self._ema.module if self._ema is not None else self._accelerator.unwrap_model(self._model)

    def _score(self, encoder: Encoder) -> float:
        return self._held_out.score(encoder)

    def _save_state(self, epoch: int, step: int) -> str:
        folder = f"state-{epoch:03d}-{step:06d}"
        state: dict[str, Any] = {
            "epoch": epoch,
            "step": step,
            "model": self._accelerator.unwrap_model(self._model).state_dict(),
            "optimiser": self._optimiser.state_dict(),
            "ema": None if self._ema is None else self._ema.module.state_dict(),
            "scaler": None if self._accelerator.scaler is None else self._accelerator.scaler.state_dict(),
        }
        if self._accelerator.is_main_process:
            save_state(self._checkpoint.path / folder, state)
        return folder

    def _resume(self) -> tuple[int, int]:
        """(epoch, step) to go on from; loads the state that an earlier run left there."""
        folder = self._checkpoint.facts.get("state")
        if not folder:
            return 0, 0
        state = load_state(self._checkpoint.path / folder)
        self._accelerator.unwrap_model(self._model).load_state_dict(state["model"])
        self._optimiser.load_state_dict(state["optimiser"])
        if self._ema is not None:
            self._ema.module.load_state_dict(state["ema"])
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(state["scaler"])
        say(f"{self._checkpoint.facts['label']}: goes on after epoch {state['epoch']}, step {state['step']}")
        return state["epoch"], state["step"]

    def _record(self, **facts: Any) -> None:
        self._checkpoint = replace(self._checkpoint, facts={**self._checkpoint.facts, **facts})
        if self._accelerator.is_main_process:
            record(self._checkpoint)
        self._accelerator.wait_for_everyone()

    def _diverged(self, what: str, found: float, number: int) -> CheckpointError:
        facts = self._checkpoint.facts
        path = self._checkpoint.path
        kept = f"epoch {facts['epoch']} is kept in {path}" if facts.get("weights") else "none was saved"
        epoch, step = divmod(number, self._per_epoch)
        return CheckpointError(
            facts["label"],
            expected=f"a finite {what}",
            found=f"{found} at epoch {epoch + 1}, step {step + 1} of {self._per_epoch}",
            remedy=f"{kept}; lower --learning-rate, or use --precision float32 or --clip-norm 1",
        )


def parameter_groups(encoder: Encoder, config: TrainConfig) -> list[dict[str, Any]]:
    """timm's groups: no decay on biases and norms, smaller rates for earlier layers, another rate for the heads."""
    if config.layer_decay < 1:
        groups = param_groups_layer_decay(encoder.backbone, config.weight_decay, layer_decay=config.layer_decay)
    else:
        groups = param_groups_weight_decay(encoder.backbone, config.weight_decay)
    ratio = config.head_learning_rate / config.learning_rate
    heads = param_groups_weight_decay(encoder.heads, config.weight_decay)
    return [*groups, *({**group, "lr_scale": ratio} for group in heads)]


def _augmentation() -> Callable[[torch.Tensor], torch.Tensor]:
    """Small enough that what was in a receptive field stays there; never a flip."""
    move = v2.RandomAffine(0, translate=(0.03, 0.03), scale=(0.97, 1.03), interpolation=v2.InterpolationMode.BILINEAR)
    return v2.Compose([move, v2.ColorJitter(0.1, 0.1, 0.1)])


def _norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def _train_mode(model: nn.Module, freeze_norm: bool) -> None:
    model.train()
    if freeze_norm:
        whole: Any = getattr(model, "module", model)  # inside what distributes it
        for norm in _norms(whole.backbone):
            norm.eval()


@contextmanager
def _still_statistics(model: nn.Module) -> Iterator[None]:
    """Batch norms use the statistics of the batch, but do not remember them."""
    momenta = [(norm, norm.momentum) for norm in _norms(model)]
    for norm, _ in momenta:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in momenta:
            norm.momentum = momentum


def _random_state(device: str) -> torch.Tensor:
    return torch.cuda.get_rng_state() if device.startswith("cuda") else torch.get_rng_state()


def _set_random_state(device: str, state: torch.Tensor) -> None:
    torch.cuda.set_rng_state(state) if device.startswith("cuda") else torch.set_rng_state(state)
