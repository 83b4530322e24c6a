"""Losses that heads and backbones are trained with: pure functions of predictions and responses.

Every loss is ``loss(predictions, responses, noise_ceiling=None) -> 0-d tensor``, so that one loop can train with any of
them; those that do not use the ceiling only check it. A ceiling on an accelerator is checked by `ceiling_on`, once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from featcache.errors import ConfigError, FeatcacheError
from heads.config.losses import LOSS_SPECS
from heads.config.registry import load

Matrix: TypeAlias = "Tensor | NDArray[Any]"
Loss: TypeAlias = Callable[..., Tensor]


def smooth_l1(predictions: Matrix, responses: Matrix, noise_ceiling: Matrix | None = None) -> Tensor:
    """Mean over images and vertices of ``e**2 / 2`` where ``|e| < 1`` and ``|e| - 1/2`` elsewhere, e the difference.

    Parameters
    ----------
    predictions, responses : (n_images, n_vertices), in the unit of the responses
    noise_ceiling : (n_vertices,), fraction of variance in [0, 1]; checked, not used

    Raises
    ------
    FeatcacheError : shapes that do not match, or a ceiling outside [0, 1]

    Source: Girshick, Fast R-CNN (2015).
    """
    predictions, responses, _ = _checked(predictions, responses, noise_ceiling)
    return functional.smooth_l1_loss(predictions, responses)


def mse(predictions: Matrix, responses: Matrix, noise_ceiling: Matrix | None = None) -> Tensor:
    """Mean over images and vertices of the squared difference.

    Parameters and errors are those of `smooth_l1`.
    """
    predictions, responses, _ = _checked(predictions, responses, noise_ceiling)
    return functional.mse_loss(predictions, responses)


def pearson(predictions: Matrix, responses: Matrix, noise_ceiling: Matrix | None = None) -> Tensor:
    """Mean over vertices of ``(1 - r_v) / 2``, r_v the correlation over the images of the batch; in [0, 1].

    A vertex whose predictions or responses are constant in the batch has r_v = 0 and no gradient.

    Parameters
    ----------
    predictions, responses : (n_images, n_vertices), any unit; at least 2 images
    noise_ceiling : (n_vertices,), fraction of variance in [0, 1]; checked, not used

    Raises
    ------
    FeatcacheError : shapes that do not match, fewer than 2 images, or a ceiling outside [0, 1]

    Source: the PC loss of the UARK-UAlbany entry to the Algonauts 2023 challenge, over images; see `pattern`.
    """
    predictions, responses, _ = _checked(predictions, responses, noise_ceiling)
    return _distance_over_images(predictions, responses).mean()


def pattern(predictions: Matrix, responses: Matrix, noise_ceiling: Matrix | None = None) -> Tensor:
    """Mean over images of ``(1 - r_i) / 2``, r_i the correlation over the vertices of one image; in [0, 1].

    An image whose predictions or responses are the same at all vertices, as those of a single vertex, has r_i = 0 and
    no gradient. Every column counts with the value that it has. A vertex that a subject lacks has no column, so it is
    no part of the pattern. A dead vertex, whose responses are constant (0 where they are z-scored), is part of it: with
    r_i > 0, its prediction is drawn to where the regression line of the image's responses on its predictions gives that
    constant. That is the mean of the predictions if the constant is the mean of the responses. Dead vertices also enter
    the means and norms of r_i, and so the gradients of all other vertices.

    Parameters
    ----------
    predictions, responses : (n_images, n_vertices), any unit, the same at all vertices
    noise_ceiling : (n_vertices,), fraction of variance in [0, 1]; checked, not used

    Raises
    ------
    FeatcacheError : shapes that do not match, or a ceiling outside [0, 1]

    Source: the PC loss of the UARK-UAlbany entry to the Algonauts 2023 challenge as its algorithm 2 prints it.
    """
    predictions, responses, _ = _checked(predictions, responses, noise_ceiling)
    return _distance(predictions.T, responses.T).mean()


def mnnpc(predictions: Matrix, responses: Matrix, noise_ceiling: Matrix | None = None) -> Tensor:
    """Mean over vertices of ``((1 - r_v) / 2)**2 / NC_v``, the noise-normalised Pearson loss.

    NC_v = 0 is taken as 1. Without any ceiling it is `pearson`: ``(1 - r_v) / 2``, not squared.

    Parameters
    ----------
    predictions, responses : (n_images, n_vertices), any unit; at least 2 images
    noise_ceiling : (n_vertices,), fraction of variance in [0, 1], never edited; or None

    Raises
    ------
    FeatcacheError : shapes that do not match, fewer than 2 images, or a ceiling outside [0, 1]

    Source: the MNNPC loss of the UARK-UAlbany entry to the Algonauts 2023 challenge.
    """
    predictions, responses, noise_ceiling = _checked(predictions, responses, noise_ceiling)
    distance = _distance_over_images(predictions, responses)
    if noise_ceiling is None:
        return distance.mean()
    return (distance**2 / noise_ceiling.masked_fill(noise_ceiling == 0, 1)).mean()


class _Losses(Mapping[str, Loss]):
    """The loss functions by name, each loaded at first use: `heads.config.losses` lists them."""

    def __getitem__(self, name: str) -> Loss:
        function: Loss = load(LOSS_SPECS[name].function)
        return function

    def __iter__(self) -> Iterator[str]:
        return iter(LOSS_SPECS)

    def __len__(self) -> int:
        return len(LOSS_SPECS)


LOSSES: Mapping[str, Loss] = _Losses()


def weighted_sum(terms: Sequence[tuple[float, str]]) -> Loss:
    """The loss ``sum(weight * LOSSES[name])`` over ``terms``, pairs of weight and name; same signature as each of them.

    Raises
    ------
    ConfigError : no terms, an unknown name, or a weight that is not a finite number above 0
    """
    terms = tuple(terms)
    if not terms:
        raise ConfigError(
            "--loss", expected="one term or more", found="none", remedy=f"choose from {', '.join(LOSSES)}"
        )
    for weight, name in terms:
        if name not in LOSSES:
            raise ConfigError("--loss", expected=f"one of {', '.join(LOSSES)}", found=repr(name), remedy="correct it")
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigError(
                f"--loss, weight of {name}", expected="a finite number above 0", found=weight, remedy="correct it"
            )

    def loss(predictions: Matrix, responses: Matrix, noise_ceiling: Matrix | None = None) -> Tensor:
        values = [weight * LOSSES[name](predictions, responses, noise_ceiling) for weight, name in terms]
        return torch.stack(values).sum()

    return loss


def _checked(
    predictions: Matrix, responses: Matrix, noise_ceiling: Matrix | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """All three as tensors of one dtype, float32 at least, on the device of the predictions."""
    predictions = torch.as_tensor(predictions)
    responses = torch.as_tensor(responses, device=predictions.device)
    if predictions.ndim != 2 or predictions.shape != responses.shape or not predictions.numel():
        raise FeatcacheError(
            "predictions and responses",
            expected="(n_images, n_vertices) both, and not empty",
            found=f"{tuple(predictions.shape)} and {tuple(responses.shape)}",
            remedy="pass the same images and vertices",
        )
    # Half precision has too few digits to sum squares over a batch.
    dtype = torch.promote_types(torch.promote_types(predictions.dtype, responses.dtype), torch.float32)
    if noise_ceiling is not None:
        noise_ceiling = _checked_ceiling(noise_ceiling, predictions).to(dtype)
    return predictions.to(dtype), responses.to(dtype), noise_ceiling


def ceiling_on(noise_ceiling: Matrix, n_vertices: int, device: torch.device | str) -> Tensor:
    """A noise ceiling, (n_vertices,), on the device that computes losses, checked once for all of them.

    Raises
    ------
    FeatcacheError : another shape, or a value outside [0, 1]
    """
    noise_ceiling = torch.as_tensor(noise_ceiling)
    _refuse_shape(noise_ceiling, n_vertices)
    if not bool(_is_fraction(noise_ceiling).all()):
        raise FeatcacheError(
            "the noise ceiling",
            expected="fractions of variance in [0, 1]",
            found=f"values from {noise_ceiling.min():.4g} to {noise_ceiling.max():.4g}",
            remedy="divide percent by 100",
        )
    return noise_ceiling.to(device)


def _checked_ceiling(noise_ceiling: Matrix, predictions: Tensor) -> Tensor:
    """The ceiling as `ceiling_on` checks it. One that is on an accelerator has NaN where it is no fraction.

    An error would have to wait for the accelerator at every step; NaN shows up in the loss.
    """
    if isinstance(noise_ceiling, Tensor) and noise_ceiling.device.type != "cpu":
        _refuse_shape(noise_ceiling, predictions.shape[1])
        return torch.where(_is_fraction(noise_ceiling), noise_ceiling, torch.nan)
    return ceiling_on(noise_ceiling, predictions.shape[1], predictions.device)


def _refuse_shape(noise_ceiling: Tensor, n_vertices: int) -> None:
    if noise_ceiling.shape != (n_vertices,):
        raise FeatcacheError(
            "the noise ceiling",
            expected=f"({n_vertices},)",
            found=tuple(noise_ceiling.shape),
            remedy="pass one value per vertex",
        )


def _is_fraction(values: Tensor) -> Tensor:
    return (values >= 0) & (values <= 1)  # False for NaN


def _distance_over_images(predictions: Tensor, responses: Tensor) -> Tensor:
    """``(1 - r_v) / 2``, (n_vertices,) in [0, 1]. Raises FeatcacheError for one image, which has no correlation."""
    if len(predictions) < 2:
        raise FeatcacheError(
            "a correlation", expected="2 images or more in a batch", found="1", remedy="use a larger batch"
        )
    return _distance(predictions, responses)


def _distance(predictions: Tensor, responses: Tensor) -> Tensor:
    """``(1 - r) / 2`` of each column, in [0, 1]."""
    r: Tensor = _Correlation.apply(predictions, responses)
    return (1 - r) / 2


class _Correlation(torch.autograd.Function):
    """r of each column, (n_columns,); 0, with a gradient of 0, where either is constant.

    With p and y centred columns of norm 1, the gradient of r = p'y with respect to the column that p was computed from
    is (y - r p) / norm. This formula reads the matrices a third as often as autograd through each step.
    """

    @staticmethod
    def forward(ctx: Any, predictions: Tensor, responses: Tensor) -> Tensor:
        p, p_norm = _unit_columns(predictions)
        y, y_norm = _unit_columns(responses)
        r: Tensor = torch.linalg.vecdot(p, y, dim=0)
        ctx.save_for_backward(p, p_norm, y, y_norm, r)
        return r

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        p, p_norm, y, y_norm, r = ctx.saved_tensors

        def gradient_of(unit: Tensor, norm: Tensor, other: Tensor) -> Tensor:
            slope = gradient / norm
            return torch.addcmul(other * slope, unit, -r * slope)

        needed = ctx.needs_input_grad
        return (
            gradient_of(p, p_norm, y) if needed[0] else None,
            gradient_of(y, y_norm, p) if needed[1] else None,
        )


def _unit_columns(values: Tensor) -> tuple[Tensor, Tensor]:
    """Columns less their mean, of norm 1, and the norms; a constant column becomes 0, and its norm infinite."""
    first = values[0]
    # The mean of a constant column may have a rounding error; minus its first row, the column is exactly 0.
    centred = values - first
    centred -= centred.mean(0)
    # divided by the largest value, squares neither overflow nor vanish
    scale = torch.linalg.vector_norm(centred, torch.inf, dim=0)
    limits = torch.finfo(values.dtype)
    constant = scale <= first.abs() * limits.eps + limits.tiny  # False for NaN, which must show up in the loss
    centred /= torch.where(constant, torch.inf, scale)
    norm = centred.norm(dim=0)
    centred /= torch.where(constant, 1, norm)
    return centred, torch.where(constant, torch.inf, norm * scale)
