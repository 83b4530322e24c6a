"""What a blend is worth, in lines for a person and as JSON."""

from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

from heads.report.scores import score_table, scores_as_json
from heads.scores.by_roi import every_summary

if TYPE_CHECKING:  # a report must not load what blends
    from heads.blend.run import Ensemble


_BEST_SINGLE = (
    "best single: for each fold and surface, the model that is best on the other folds. So it may score less than the "
    "best model of 'models' and 'fit-heads', which is chosen by its score on all images."
)


def blend_table(done: "Ensemble", label: str, each_surface: bool = False) -> RenderableType:
    """Table of the scores of a blend, and of what it is compared with.

    label : of the settings of the blend
    each_surface : as for `score_table`
    """
    marked = done.scores if done.chosen_on else ()
    if len(done.scores) == 1:
        return score_table(
            done.scores, "Out-of-fold scores of one model, which is passed through", marked, each_surface
        )
    title = f"Out-of-fold scores; weights of the blend ({label}) were learnt on other folds"
    return score_table(done.scores, title, marked, each_surface, [_BEST_SINGLE])


def gain_lines(done: "Ensemble") -> list[str]:
    """Lines on what a blend is worth: gains with their intervals, blends of shuffled responses, models of no weight."""
    unit = " points" if done.accuracy else " of mean r"
    digits = 2 if done.accuracy else 4
    lines = []
    for gain in done.gains:
        share = f" ({100 * gain.gain / gain.score:+.1f} %)" if gain.score > 0 else ""
        lines.append(
            f"blend over {gain.over}: {gain.gain:+.{digits}f}{unit}{share}, 95 % interval over images "
            f"{gain.low:+.{digits}f} to {gain.high:+.{digits}f}; optimistic, on the images its weights were learnt on: "
            f"{gain.optimistic:+.{digits}f}"
        )
    if done.null is not None:
        lines.append(
            f"blends of shuffled responses: mean r {done.null.mean:.4f}, at most {done.null.largest:.4f}; "
            f"optimistic {done.null.optimistic:.4f}"
        )
    if done.unused:
        lines.append(f"no weight anywhere: {', '.join(done.unused)}")
    return lines


def blend_as_json(done: "Ensemble") -> dict[str, Any]:
    """A blend as JSON: weights, unused, chosen_on, scores, gains, shuffled and test_scores, as in `Ensemble`;
    scores_by_roi. Of one model there are no gains, and shuffled is null.
    """
    return {
        "weights": done.weights,
        "unused": done.unused,
        "chosen_on": list(done.chosen_on),
        "scores": scores_as_json(done.scores),
        "scores_by_roi": [row.to_json() for row in every_summary(done.scores["blend"])] if done.scores else [],
        "gains": [vars(gain) for gain in done.gains],
        "shuffled": None if done.null is None else vars(done.null),
        "test_scores": scores_as_json(done.test) if done.test else {},
    }
