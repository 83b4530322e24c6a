"""How sure a blend's gain is: an interval over images, and the score of blends of shuffled responses.

Both need the images one by one, which sums of products do not have: they use the vertices whose rows were kept.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from featcache.dataset.splits import BY_ID, Split
from featcache.dataset.subject import Subject
from heads.blend.learn import Learnt, nested_r
from heads.blend.products import N_FOLDS, SEED, Gathered, Products, Sample, of_tiles
from heads.blend.weights import Judge
from heads.scores.resampling import LEVEL, N_DRAWS, image_weights, response_sums, weighted_r, with_all_alike

N_BOOTSTRAPS, N_PERMUTATIONS = N_DRAWS, 10
NULL_VERTICES = 200  # of the sample, at most: each permutation learns all weights anew


@dataclass(frozen=True)
class Scorer:
    """The score that is reported: noise-normalised accuracy in percent, or r where there are no ceilings.

    judge : metric on the vertices that have a ceiling; None for r
    n_vertices : number of vertices that the mean is over
    """

    judge: Judge | None
    n_vertices: int

    def mean(self, r: np.ndarray) -> np.ndarray:
        """Mean score, (...,), of r (..., n_vertices)."""
        mean: np.ndarray = r.mean(-1) if self.judge is None else 100 * self.judge.mean(r)
        return mean

    def at(self, vertices: np.ndarray) -> "Scorer":
        """The score of some of the vertices, which stand for as many as before."""
        return self if self.judge is None else replace(self, judge=self.judge.at(vertices))


def scorer_of(subject: Subject, judge: Judge, accuracy: bool) -> Scorer:
    """The score of all vertices of a subject.

    judge : of the subject
    accuracy : whether any subject has ceilings
    """
    if not accuracy:
        return Scorer(None, len(judge.counts))
    has_ceiling = [subject.noise_ceiling[surface] is not None for surface in subject.surfaces]
    judged = Judge(judge.ceiling, judge.counts & np.repeat(has_ceiling, list(subject.n_vertices.values())))
    return Scorer(judged, int(judged.counts.sum()))


@dataclass(frozen=True)
class Resampled:
    """One subject's scores, by the name of the blend: 'best single', 'uniform', 'blend', 'optimistic'.

    'optimistic' is the blend on the images that its weights were learnt on.

    whole : over all vertices
    sample : over the sampled vertices
    bootstraps : (n_bootstraps,) over the sampled vertices
    shuffled : (n_permutations,) mean r of the same procedure with the responses of other images. It is r also where
        there are ceilings: r is 0 on average there, and accuracy, made from its square, is not
    n_vertices : weight of the subject in means over subjects
    """

    whole: Mapping[str, float]
    sample: Mapping[str, float]
    bootstraps: Mapping[str, np.ndarray]
    shuffled: Mapping[str, np.ndarray]
    n_vertices: int


Relearn = Callable[[Products, np.ndarray], Learnt]  # learns a blend of some vertices, given by number


def resample(
    gathered: Gathered,
    image_ids: np.ndarray,
    r: Mapping[str, np.ndarray],
    learnt: Learnt,
    relearn: Relearn,
    scorer: Scorer,
    seed: int,
    by: Split = BY_ID,
) -> Resampled:
    """Score one subject's blend over bootstraps of its images, and blends of shuffled responses.

    image_ids : (n_images,)
    r : {name: (n_vertices,)} of the blends
    by : the split of the models
    """
    sample, folds = gathered.sample, by.folds(image_ids, N_FOLDS, SEED)
    nested = {name: [of_fold[sample.vertices] for of_fold in weights] for name, weights in learnt.nested.items()}
    drawn = bootstrap(sample, folds, nested, image_weights(image_ids, seed, N_BOOTSTRAPS))
    scores = {name: scorer.at(sample.vertices).mean(r_drawn) for name, r_drawn in drawn.items()}
    return Resampled(
        whole={name: float(scorer.mean(r_all)) for name, r_all in r.items()},
        sample={name: float(score[0]) for name, score in scores.items()},
        bootstraps={name: score[1:] for name, score in scores.items()},
        shuffled=_shuffled_r(gathered, folds, relearn, seed),
        n_vertices=scorer.n_vertices,
    )


def _shuffled_r(gathered: Gathered, folds: np.ndarray, relearn: Relearn, seed: int) -> dict[str, np.ndarray]:
    """{name: (n_permutations,) mean r} of blends that are learnt again, each from responses in another random order."""
    sample = gathered.sample.thinned(NULL_VERTICES)
    known, generator = gathered.products.at(sample.vertices), np.random.default_rng(seed)
    means: dict[str, list[float]] = {}
    for _ in range(N_PERMUTATIONS):
        products = shuffled_products(known, sample, folds, generator.permutation(len(folds)))
        learnt = relearn(products, sample.vertices)
        r = {name: nested_r(products, weights) for name, weights in learnt.nested.items()}
        r["optimistic"] = nested_r(products, [learnt.weights] * N_FOLDS)
        for name, values in r.items():
            means.setdefault(name, []).append(values.mean())
    return {name: np.array(values) for name, values in means.items()}


def bootstrap(
    sample: Sample, folds: np.ndarray, nested: Mapping[str, Sequence[np.ndarray]], drawn: np.ndarray
) -> dict[str, np.ndarray]:
    """r of nested blends, {name: (1 + n_bootstraps, n_sample)}; the first row is for the images as they are.

    folds : (n_images,)
    nested : {name: (n_sample, n_models) of each fold}
    drawn : (n_bootstraps, n_images)
    """
    times, y = with_all_alike(drawn), sample.columns[-1]
    sums = response_sums(times, y)
    r = {}
    for name, weights in nested.items():
        of_models = np.stack(weights, axis=1, dtype=np.float32).T.copy()  # (n_models, n_folds, n_sample)
        blend = np.zeros_like(y)
        for column, of_folds in zip(sample.columns[:-1], of_models, strict=True):
            blend += column * of_folds[folds]
        r[name] = weighted_r(times, blend, y, sums)
    return r


def shuffled_products(known: Products, sample: Sample, folds: np.ndarray, order: np.ndarray) -> Products:
    """The products of the sampled vertices with the responses of other images.

    known : products of these vertices
    order : (n_images,) the image whose responses each image has now
    """
    sums, y = known.sums.copy(), torch.from_numpy(sample.columns[-1][order])
    of_fold = torch.from_numpy((folds == np.arange(len(sums))[:, None]).astype(np.float32))  # (n_folds, n_images)

    def of_models(models: slice) -> None:
        for model in range(models.start, models.stop):
            products = of_fold @ (torch.from_numpy(sample.columns[model]) * y)
            sums[..., model, -2] = sums[..., -2, model] = products.numpy()

    of_tiles(of_models, len(sample.columns) - 1, step=1)
    sums[..., -2, -2] = (of_fold @ y**2).numpy()
    sums[..., -2, -1] = sums[..., -1, -2] = (of_fold @ y).numpy()
    return Products(sums, cross_fitted=False)


@dataclass(frozen=True)
class Gain:
    """What the blend gains over another, in the units of the score, over all subjects."""

    over: str
    score: float  # of the other
    gain: float  # of weights learnt on other folds
    low: float  # of the interval over images
    high: float
    optimistic: float  # gain on the images that the weights were learnt on


@dataclass(frozen=True)
class Null:
    """Mean r of blends of shuffled responses, where there is nothing to find."""

    mean: float
    largest: float
    optimistic: float  # mean, on the images that the weights were learnt on


def gains(resampled: Sequence[Resampled]) -> list[Gain]:
    """Gains of the blend over the best single model and over the uniform blend."""
    return [_gain(resampled, "best single"), _gain(resampled, "uniform")]


def _gain(resampled: Sequence[Resampled], other: str) -> Gain:
    weights = _subject_weights(resampled)

    def mean(values: Sequence[float]) -> float:
        return float(weights @ np.array(values))

    gain = mean([subject.whole["blend"] - subject.whole[other] for subject in resampled])
    deviations = [
        subject.bootstraps["blend"] - subject.bootstraps[other] - (subject.sample["blend"] - subject.sample[other])
        for subject in resampled
    ]
    low, high = np.quantile(weights @ np.stack(deviations), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Gain(
        over=other,
        score=mean([subject.whole[other] for subject in resampled]),
        gain=gain,
        low=gain + float(low),
        high=gain + float(high),
        optimistic=mean([subject.whole["optimistic"] - subject.whole[other] for subject in resampled]),
    )


def null(resampled: Sequence[Resampled]) -> Null:
    """Scores of blends of shuffled responses, over all subjects."""
    weights = _subject_weights(resampled)
    blend, optimistic = (
        weights @ np.stack([subject.shuffled[name] for subject in resampled]) for name in ("blend", "optimistic")
    )
    return Null(float(blend.mean()), float(blend.max()), float(optimistic.mean()))


def _subject_weights(resampled: Sequence[Resampled]) -> np.ndarray:
    n = np.array([subject.n_vertices for subject in resampled], dtype=np.float64)
    return np.asarray(n / max(n.sum(), 1))
