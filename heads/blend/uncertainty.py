"""How sure a blend's gain is: an interval over images, and what blending finds where there is nothing to find.

Both need the images one by one, which moments do not have: they are of the sample of vertices whose rows were kept.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from featcache.dataset.rois import HEMISPHERES
from featcache.dataset.splits import assign_folds
from featcache.dataset.subject import Subject
from heads.blend.learn import Learnt, nested_r
from heads.blend.products import N_FOLDS, SEED, Gathered, Moments, Sample
from heads.blend.weights import Judge, r_from, r_of

N_BOOTSTRAPS, N_PERMUTATIONS = 400, 10
LEVEL = 0.95  # of the interval
NULL_VERTICES = 200  # of the sample, at most: each permutation learns all weights anew


@dataclass(frozen=True)
class Scorer:
    """The score that is reported: noise-normalised accuracy in percent, or r where there are no ceilings.

    judge : of vertices that have a ceiling; None for r
    n_vertices : that the mean is over
    """

    judge: Judge | None
    n_vertices: int

    def mean(self, r: np.ndarray) -> np.ndarray:
        """(..., n_vertices) -> (...,)"""
        return r.mean(-1) if self.judge is None else 100 * self.judge.mean(r)

    def at(self, vertices: np.ndarray) -> "Scorer":
        """Of some of the vertices, for as many as before."""
        return self if self.judge is None else replace(self, judge=self.judge.at(vertices))


def scorer_of(subject: Subject, judge: Judge, accuracy: bool) -> Scorer:
    """Of all vertices of both hemispheres, `judge` being that of the metric."""
    if not accuracy:
        return Scorer(None, len(judge.counts))
    known = np.concatenate([np.full(subject.n_vertices[h], subject.noise_ceiling[h] is not None) for h in HEMISPHERES])
    judged = Judge(judge.ceiling, judge.counts & known)
    return Scorer(judged, int(judged.counts.sum()))


@dataclass(frozen=True)
class Resampled:
    """One subject's scores, by the name of what is scored.

    whole : over all vertices; 'optimistic' is the blend on the images that its weights were learnt on
    sample : over the sampled vertices
    bootstraps : (n_bootstraps,) over the sampled vertices
    shuffled : (n_permutations,) mean r of the same procedure with the responses of other images; r is 0 there on
        average, and accuracy, which is of its square, is not
    n_vertices : what the subject counts in means over subjects
    """

    whole: Mapping[str, float]
    sample: Mapping[str, float]
    bootstraps: Mapping[str, np.ndarray]
    shuffled: Mapping[str, np.ndarray]
    n_vertices: int


def resample(
    gathered: Gathered,
    image_ids: np.ndarray,
    r: Mapping[str, np.ndarray],
    learnt: Learnt,
    again: Callable[[Moments, np.ndarray], Learnt],
    scorer: Scorer,
    seed: int,
) -> Resampled:
    """Score one subject's blend over bootstraps of its images, and blends of shuffled responses.

    image_ids : (n_images,)
    r : {name: (n_vertices,)} of the blend
    again : learns a blend of some vertices, given by number, from their moments
    """
    sample, folds = gathered.sample, assign_folds(image_ids, N_FOLDS, SEED)
    score = scorer.at(sample.vertices).mean
    nested = {name: [of_fold[sample.vertices] for of_fold in weights] for name, weights in learnt.nested.items()}
    drawn = {
        name: score(of_name)
        for name, of_name in bootstrap(sample, folds, nested, image_weights(image_ids, seed)).items()
    }
    few = sample.thinned(NULL_VERTICES)
    known, null = gathered.moments.at(few.vertices), []
    generator = np.random.default_rng(seed)
    for _ in range(N_PERMUTATIONS):
        moments = shuffled_moments(known, few, folds, generator.permutation(len(folds)))
        found = again(moments, few.vertices)
        r_null = {name: nested_r(moments, weights).mean() for name, weights in found.nested.items()}
        null.append(r_null | {"optimistic": r_of(moments.total().sums, found.weights).mean()})
    return Resampled(
        {name: float(scorer.mean(of_name)) for name, of_name in r.items()},
        {name: float(scores[0]) for name, scores in drawn.items()},
        {name: scores[1:] for name, scores in drawn.items()},
        {name: np.array([one[name] for one in null]) for name in null[0]},
        scorer.n_vertices,
    )


def image_weights(image_ids: np.ndarray, seed: int) -> np.ndarray:
    """(n_bootstraps, n_images) weights of the Bayesian bootstrap, exponential with mean 1 (Rubin 1981).

    A function of the image id alone, so that an image that several subjects saw is drawn for all of them or for none.
    """
    unique, places = np.unique(image_ids, return_inverse=True)
    drawn = np.stack([np.random.default_rng((seed, int(i))).exponential(size=N_BOOTSTRAPS) for i in unique], axis=1)
    return drawn[:, places]


def bootstrap(
    sample: Sample, folds: np.ndarray, nested: Mapping[str, Sequence[np.ndarray]], drawn: np.ndarray
) -> dict[str, np.ndarray]:
    """{name: (1 + n_bootstraps, n_sample) r} of nested blends; the first row is of the images as they are.

    folds : (n_images,)
    nested : {name: (n_sample, n_models) of each fold}
    drawn : (n_bootstraps, n_images)
    """
    times = np.concatenate([np.ones((1, len(folds))), drawn]).astype(np.float32)
    y = sample.columns[-1]
    n, of_y, of_squares = times.sum(1, dtype=np.float64)[:, None], times @ y, times @ y**2
    found = {}
    for name, weights in nested.items():
        blend = np.zeros_like(y)
        for fold, of_fold in enumerate(weights):
            rows = folds == fold
            for column, weight in zip(sample.columns[:-1], of_fold.T.astype(np.float32), strict=True):
                blend[rows] += column[rows] * weight
        found[name] = r_from(n, times @ blend, times @ blend**2, times @ (blend * y), of_y, of_squares)
    return found


def shuffled_moments(known: Moments, sample: Sample, folds: np.ndarray, order: np.ndarray) -> Moments:
    """The moments of the sampled vertices, as `known`, with the responses of other images, `order` (n_images,)."""
    sums, y = known.sums.copy(), sample.columns[-1][order]
    for fold, of_fold in enumerate(sums):
        rows = folds == fold
        own = y[rows]
        for model, column in enumerate(sample.columns[:-1]):
            of_fold[:, model, -2] = of_fold[:, -2, model] = np.einsum("iv,iv->v", column[rows], own)
        of_fold[:, -2, -2] = np.einsum("iv,iv->v", own, own)
        of_fold[:, -2, -1] = of_fold[:, -1, -2] = own.sum(0)
    return Moments(sums, cross_fitted=False)


@dataclass(frozen=True)
class Gain:
    """What the blend has over another, in the units of the score, over all subjects."""

    over: str
    score: float  # of the other
    gain: float  # of weights learnt on other folds
    low: float  # of the interval over images
    high: float
    optimistic: float  # gain on the images that the weights were learnt on


@dataclass(frozen=True)
class Null:
    """Mean r of blends of shuffled responses: what is found where there is nothing to find."""

    mean: float
    largest: float
    optimistic: float  # mean, on the images that the weights were learnt on


def gains(resampled: Sequence[Resampled]) -> list[Gain]:
    """Of the blend over the best single model and over the uniform blend."""
    weights = _weights(resampled)
    found = []
    for other in ("best single", "uniform"):
        score, gain, optimistic = (
            float(weights @ np.array(values))
            for values in (
                [one.whole[other] for one in resampled],
                [one.whole["blend"] - one.whole[other] for one in resampled],
                [one.whole["optimistic"] - one.whole[other] for one in resampled],
            )
        )
        away = [
            one.bootstraps["blend"] - one.bootstraps[other] - (one.sample["blend"] - one.sample[other])
            for one in resampled
        ]
        low, high = np.quantile(weights @ np.stack(away), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        found.append(Gain(other, score, gain, gain + float(low), gain + float(high), optimistic))
    return found


def null(resampled: Sequence[Resampled]) -> Null:
    weights = _weights(resampled)
    blend, optimistic = (
        weights @ np.stack([one.shuffled[name] for one in resampled]) for name in ("blend", "optimistic")
    )
    return Null(float(blend.mean()), float(blend.max()), float(optimistic.mean()))


def _weights(resampled: Sequence[Resampled]) -> np.ndarray:
    n = np.array([one.n_vertices for one in resampled], dtype=np.float64)
    return n / max(n.sum(), 1)
