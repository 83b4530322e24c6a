"""The blend of one subject: learnt, scored and resampled."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from featcache.dataset.splits import BY_ID, Split, refuse_leak
from featcache.dataset.subject import Subject
from heads.blend.learn import Choice, Learnt, judge_of, learn, levels_of, nested_r
from heads.blend.models import Model
from heads.blend.products import N_FOLDS, SEED, Products, gather, surface_blocks
from heads.blend.saved import Coefficients, NestedCoefficients, coefficients_of, nested_of
from heads.blend.uncertainty import Resampled, resample, scorer_of
from heads.config import BlendConfig
from heads.scores.metrics import VertexScores


@dataclass(frozen=True)
class Blended:
    """One subject's blend. The vertices of its surfaces are side by side.

    models : names
    weights : (n_vertices, n_models), of the standardised predictions
    coefficients : {surface: coefficients}, of the predictions as they are
    nested : {surface: the same out of fold}
    resampled : None where nothing is compared
    r : {name: (n_vertices,)} of 'best single', 'uniform' and 'blend', with weights learnt on other folds, and of
        'optimistic', the blend on the images that its weights were learnt on
    """

    models: tuple[str, ...]
    weights: np.ndarray
    coefficients: dict[str, Coefficients]
    nested: dict[str, NestedCoefficients]
    choices: Sequence[Choice]
    r: dict[str, np.ndarray]
    resampled: Resampled | None


def blend_subject(
    subject: Subject,
    models: Sequence[Model],
    config: BlendConfig,
    accuracy: bool,
    by: Split = BY_ID,
    compared: bool = True,
) -> Blended:
    """Learn, score and resample one subject's blend.

    accuracy : whether to score by the noise ceilings, or else by r
    by : the split of the models
    compared : whether there is anything to compare the blend with, so that single images are drawn again
    """
    _refuse_leaks(subject, by)
    gathered, judge, levels = gather(subject, [one.store for one in models], by), judge_of(subject), levels_of(subject)
    parts = _backbone_means(models) if config.by == "backbone" else None
    learnt = learn(gathered.products, judge, levels, config, parts)
    r = {name: nested_r(gathered.products, weights) for name, weights in learnt.nested.items()}
    r["optimistic"] = nested_r(gathered.products, [learnt.weights] * N_FOLDS)

    def relearn(products: Products, vertices: np.ndarray) -> Learnt:
        return learn(products, judge.at(vertices), [level.at(vertices) for level in levels], config, parts)

    resampled = None
    if compared:
        scorer = scorer_of(subject, judge, accuracy)
        resampled = resample(gathered, subject.train.ids, r, learnt, relearn, scorer, config.seed, by)
    names = tuple(model.name for model in models)
    coefficients = coefficients_of(subject, names, gathered, learnt.weights)
    nested = nested_of(subject, names, gathered, learnt.weights, learnt.nested["blend"])
    return Blended(names, learnt.weights, coefficients, nested, learnt.choices, r, resampled)


def _refuse_leaks(subject: Subject, by: Split) -> None:
    ids = subject.train.ids
    folds = by.folds(ids, N_FOLDS, SEED)
    for fold in range(N_FOLDS):
        refuse_leak(ids[folds != fold], ids[folds == fold], f"the blend of {subject.name}", by)


def _backbone_means(models: Sequence[Model]) -> np.ndarray:
    """The mean of each backbone's models, (n_backbones, n_models)."""
    names = [model.key.backbone for model in models]
    same = np.array([[name == backbone for name in names] for backbone in dict.fromkeys(names)], dtype=np.float64)
    return np.asarray(same / same.sum(1, keepdims=True))


def mean_weights(subject: Subject, blended: Blended) -> dict[str, dict[str, dict[str, float]]]:
    """{surface: {'all' or ROI: {model: mean weight over its vertices}}}; an ROI without vertices is left out."""
    means: dict[str, dict[str, dict[str, float]]] = {}
    for surface, block in surface_blocks(subject).items():
        weights = blended.weights[block]
        masks = {"all": np.full(len(weights), True)} | subject.rois[surface]
        means[surface] = {
            roi: dict(zip(blended.models, weights[mask].mean(0).round(6).tolist(), strict=True))
            for roi, mask in masks.items()
            if mask.any()
        }
    return means


def vertex_scores(subject: Subject, r: np.ndarray) -> list[VertexScores]:
    """Scores of each surface, from r of all vertices."""
    return [
        VertexScores(subject.name, surface, r[block], subject.noise_ceiling[surface], subject.rois[surface])
        for surface, block in surface_blocks(subject).items()
    ]
