"""What a training changes: the network, its optimiser, and the running mean of its weights."""

from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from timm.optim import param_groups_layer_decay, param_groups_weight_decay  # type: ignore[attr-defined]
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.utils.model_ema import ModelEmaV3
from torch import nn

from heads.backbones.encoder import Encoder
from heads.config import TrainConfig


class Learner:
    """An encoder on its device with all that a step of training updates.

    Parameters
    ----------
    n_steps : steps of an epoch, over which the learning rate follows its schedule

    Attributes
    ----------
    model : the encoder as accelerate prepared it: call this one, so that processes exchange gradients
    """

    def __init__(self, encoder: Encoder, config: TrainConfig, accelerator: Accelerator, n_steps: int) -> None:
        encoder.to(accelerator.device)
        self.accelerator, self._freeze_norm = accelerator, config.freeze_norm
        self._mean = ModelEmaV3(encoder, config.ema, use_warmup=True) if config.ema else None
        optimiser = adamw(parameter_groups(encoder, config), config.learning_rate)
        self._schedule = cosine_schedule(optimiser, config, n_steps)
        self.model: nn.Module
        self.model, self.optimiser = accelerator.prepare(encoder, optimiser)

    @property
    def device(self) -> str:
        """Device of the network."""
        return str(self.accelerator.device)

    @property
    def encoder(self) -> Encoder:
        """The network as it was before accelerate prepared it, with its weights of now."""
        return cast(Encoder, self.accelerator.unwrap_model(self.model))

    @property
    def scored(self) -> Encoder:
        """The network that is scored and saved: with the mean of the weights where one is kept."""
        return self.encoder if self._mean is None else cast(Encoder, self._mean.module)

    def train_mode(self) -> None:
        """Prepare the network for steps of training, with the backbone's batch statistics frozen where asked for."""
        self.model.train()
        if self._freeze_norm:
            for norm in norms(self.encoder.backbone):
                norm.eval()

    def update(self, number: int) -> None:
        """Change the weights by their gradients, at the learning rate of this step; steps count from 0."""
        self._schedule.step_update(number)
        self.optimiser.step()
        if self._mean is not None:
            self.share_statistics()
            self._mean.update(self.encoder, number)

    def share_statistics(self) -> None:
        """Give every process the running statistics of the first, as the next forward pass would."""
        for buffer in self.encoder.buffers():
            broadcast(buffer)

    def state(self) -> dict[str, Any]:
        """All that a later run needs to take the same steps: tensors and numbers."""
        scaler = self.accelerator.scaler
        return {
            "model": self.encoder.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "ema": None if self._mean is None else self._mean.module.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Become what another run was when it gave this `state`."""
        self.encoder.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        if self._mean is not None:
            self._mean.module.load_state_dict(state["ema"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])


def parameter_groups(encoder: Encoder, config: TrainConfig) -> list[dict[str, Any]]:
    """Groups of parameters, timm's: no decay of biases and norms, lower rates of earlier layers, another of heads."""
    if config.layer_decay < 1:
        groups = param_groups_layer_decay(encoder.backbone, config.weight_decay, layer_decay=config.layer_decay)
    else:
        groups = param_groups_weight_decay(encoder.backbone, config.weight_decay)
    ratio = config.head_learning_rate / config.learning_rate
    heads = param_groups_weight_decay(encoder.heads, config.weight_decay)
    return [*groups, *({**group, "lr_scale": ratio} for group in heads)]


def adamw(groups: list[dict[str, Any]], learning_rate: float) -> torch.optim.AdamW:
    """AdamW over groups of parameters: one kernel for all of them where all are real numbers on CUDA.

    On a CPU it is torch's default, whose bits trainings of before have.
    """
    fused = all(one.is_cuda and one.is_floating_point() for group in groups for one in group["params"])
    return torch.optim.AdamW(groups, lr=learning_rate, fused=fused or None)


def cosine_schedule(optimiser: torch.optim.Optimizer, config: TrainConfig, n_steps: int) -> CosineLRScheduler:
    """Learning rate that rises over the warm-up, then falls on a cosine to zero after the last epoch of `n_steps`."""
    total = config.epochs * n_steps
    # of 2 steps or more: timm warns of a cosine of one, and the first step of a longer one is the same
    return CosineLRScheduler(optimiser, max(total, 2), warmup_t=round(config.warmup * n_steps), t_in_epochs=False)


def norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Every batch norm of a network."""
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
