"""Subjects whose models are made up, scored."""

import numpy as np

import heads.statistics.run
from featcache.dataset.splits import BY_ID
from heads.config import ScoresConfig
from heads.statistics.run import Scores, score_models
from heads.statistics.sources import Folding, Scored
from support.statistics import Given, subject_with

N, WIDTHS = 120, {"lh": 30, "rh": 20}
ROIS = {
    "lh": {"V1": np.arange(30) < 10, "early": np.arange(30) < 15, "none": np.zeros(30, bool)},
    "rh": {"V1": np.arange(20) > 14},
}
CEILINGS = {"lh": np.linspace(0, 1, 30, dtype=np.float32), "rh": None}
FOLDING = Folding(5, 0, BY_ID)


def made(folder, n_subjects=1, seed=0, ceilings=CEILINGS):
    """{subject: [good, bad]}: the good model knows the first half of each surface, the bad one nothing."""
    found = {}
    for number in range(n_subjects):
        rng = np.random.default_rng((seed, number))
        y = {surface: rng.normal(size=(N, n)).astype(np.float32) for surface, n in WIDTHS.items()}
        y["lh"][:, 20] = 4
        knows = {surface: np.arange(n) < n // 2 for surface, n in WIDTHS.items()}
        good, bad = (
            {s: (1.5 * share * knows[s] * y[s] + rng.normal(size=y[s].shape)).astype(np.float32) for s in WIDTHS}
            for share in (1, 0)
        )
        subject = subject_with(folder, y, f"subj{number + 1:02d}", rois=ROIS, ceilings=ceilings)
        models = [Given("good", good), Given("bad", bad)]
        found[subject] = [Scored(model, FOLDING, model.name == "bad") for model in models]
    return found


def scored(found, monkeypatch, intervals=True, **settings) -> Scores:
    monkeypatch.setattr(heads.statistics.run, "find_scored", lambda *_: found)
    return score_models(list(found), ScoresConfig(**settings), "work", intervals)
