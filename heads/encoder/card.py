"""The card of an encoder: what it predicts, how well, from what it was made, and what may be done with it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from heads.encoder.parts import Parts

_HEADER = """---
library_name: featcache
tags: [neuroscience, encoding-model, vision]
license: other
---

"""
_TERMS = """## Terms and limits

The weights of the networks keep the licences of whoever published them, and what was learnt from the responses keeps
the terms of their dataset. Who hands this on states both here.

Predictions are good for images like those that were shown. Where the noise ceiling is low, predictions mean little.
"""


@dataclass(frozen=True)
class Score:
    """How well the vertices of an ROI, or all of one subject, are predicted out of fold.

    value, low, high : with the ends of a 95 % interval over images, None where there is none
    """

    subject: str
    roi: str
    model: str
    n_vertices: int
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a card says.

    data : where images and responses came from, in words
    scores : out of fold, of the blend or of models
    measure : what the scores are, in words
    versions : {package: version}
    n_images : {subject: images that it was fitted to}
    """

    parts: Parts
    data: str
    scores: Sequence[Score] = ()
    measure: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    n_images: Mapping[str, int] = field(default_factory=dict)


def card_text(card: Card) -> str:
    """The card as Markdown, with the header that model hubs read."""
    return _HEADER + "\n".join([_what(card), _use(card), _scores(card), _made_of(card), _TERMS])


def _what(card: Card) -> str:
    lines = [
        "# An encoder of visual responses\n",
        "It predicts the response of each vertex (or voxel, or neuron) to any image, in the units of the responses "
        "that it was fitted to.\n",
        f"Data: {card.data}\n",
        "| subject | surfaces | images fitted to | ROIs |",
        "|---|---|---|---|",
    ]
    for name, part in card.parts.subjects.items():
        surfaces = ", ".join(f"{surface} ({n:,})" for surface, n in part.n_vertices.items())
        lines.append(f"| {name} | {surfaces} | {card.n_images.get(name, 0):,} | {', '.join(part.roi_names) or '-'} |")
    return "\n".join(lines) + "\n"


def _use(card: Card) -> str:
    subjects = list(card.parts.subjects.values())
    more = f', subject="{subjects[0].name}"' if len(subjects) > 1 else ""
    roi = f', roi="{subjects[0].roi_names[0]}"' if subjects[0].roi_names else ""
    return f"""## Use

```python
import featcache as fc

encoder = fc.load_encoder("path/of/this/folder")
responses = encoder.predict(["picture.jpg"]{more}{roi})  # (n_images, n_vertices)
```

or `featcache predict photos/ --encoder path/of/this/folder --out predicted.zarr`.
"""


def _scores(card: Card) -> str:
    if not card.scores:
        return "## Scores\n\nNone are known: there were no out-of-fold scores beside the models.\n"
    lines = [
        "## Scores\n",
        f"{card.measure}, of images that were not fitted to; with 95 % intervals over images, where given.\n",
        "| subject | ROI | model | vertices | score |",
        "|---|---|---|---|---|",
    ]
    for one in card.scores:
        interval = "" if one.low is None or one.high is None else f" ({one.low:.3f} to {one.high:.3f})"
        lines.append(f"| {one.subject} | {one.roi} | {one.model} | {one.n_vertices:,} | {one.value:.3f}{interval} |")
    return "\n".join(lines) + "\n"


def _made_of(card: Card) -> str:
    lines = ["## Made of\n"]
    for part in card.parts.features.values():
        size, fold = "x".join(map(str, part.key.transform["input_size"][1:])), part.key.fold
        trained = f", after {fold.stage} without fold {fold.fold} of {fold.n_folds}" if fold else ""
        layers = ", ".join(part.key.layers)
        lines.append(f"- `{part.network}` at {size} pixels{trained}: {layers}; arithmetic in {part.key.dtype}")
    for name, subject in card.parts.subjects.items():
        what = "a blend of " if subject.blend else ""
        lines.append(f"- {name}: {what}{', '.join(f'`{model}`' for model in subject.models)}")
    lines.append(f"- versions: {', '.join(f'{name} {version}' for name, version in card.versions.items())}")
    return "\n".join(lines) + "\n"
