"""One checkpoint whose weights are the mean of several that were trained from one start: the uniform soup.

Members of a family differ in their settings alone (loss, seed, epochs, learning rates, ...). The mean is an ordinary
checkpoint, which costs one backbone to extract where a blend of its members costs all of theirs.

Source: Wortsman et al. 2022, Model soups, https://arxiv.org/abs/2203.05482
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featcache.backbone.checkpoint import (
    FOLDER,
    Checkpoint,
    checkpoint_path,
    label_of,
    list_checkpoints,
    open_checkpoint,
    prune,
    record,
    save_weights,
)
from featcache.cache.pixels import cache_pixels
from featcache.config import fingerprint
from featcache.dataset.digests import digests, subject_digests
from featcache.dataset.splits import refuse_leak
from featcache.dataset.subject import Subject
from featcache.errors import CheckpointError, ConfigError
from featcache.machine.device import resolve_device
from featcache.machine.files import only_writer
from featcache.machine.memory import keep_freed_memory
from featcache.machine.progress import say
from heads.backbones.batches import Images
from heads.backbones.encoder import Encoder, SavedHeads
from heads.backbones.loop import HeldOut, make_accelerator
from heads.config import SoupConfig, TrainConfig

_COUNTERS = "num_batches_tracked"  # of batch norms: the only whole numbers in which members may differ


@dataclass(frozen=True)
class Soup:
    """The mean of a family's checkpoints of one fold, of one subject in stage 2.

    members : name, training, score and digests of each; their scores are those that their trainings kept
    """

    checkpoint: Checkpoint
    new: bool

    @property
    def members(self) -> list[dict[str, Any]]:
        return list(self.checkpoint.facts["members"])

    @property
    def score(self) -> float:
        """On the held-out fold, as training scores an epoch."""
        return float(self.checkpoint.facts["score"])

    @property
    def best(self) -> float:
        """The score of the best member."""
        return max(member["score"] for member in self.members)

    @property
    def mean(self) -> float:
        """The mean score of the members."""
        return float(np.mean([member["score"] for member in self.members]))


def make_soups(subjects: Sequence[Subject], config: SoupConfig, work: Path) -> list[Soup]:
    """Average each family of checkpoints, for every fold that all its members have.

    Nothing is chosen by score: every soup is kept, and those below their best member are named. What is there already
    is skipped, and made again where a member has other weights now. Raises CheckpointError where there is no family of
    two or more, and for members whose tensors differ in name, shape or meaning; LeakError for a member that saw images
    of the fold that is held out.
    """
    config = replace(config, device=resolve_device(config.device))
    if config.device == "cpu":
        keep_freed_memory()
    by_name = {subject.name: subject for subject in subjects}
    known = _matching(_usable(by_name, config.stage, work), config, work)
    groups = [group for family in _families(known) for group in _groups(family)]
    if not groups:
        raise CheckpointError(
            work / FOLDER,
            expected=f"two or more finished {config.stage} checkpoints that differ in settings alone",
            found=f"{len(known)} and none beside another",
            remedy="train again with another --loss or --seed",
        )
    return [_soup([by_name[name] for name in group[0].key["subjects"]], group, config, work) for group in groups]


def mean_weights(named: Iterable[tuple[str, Mapping[str, torch.Tensor]]]) -> dict[str, torch.Tensor]:
    """The mean of each tensor over several networks, summed in float64 and of the tensor's own type.

    Whole numbers are what outputs mean and must be equal; the counters of batch norms are those of the first.

    named : (name, tensors) of each network, one at a time. Raises CheckpointError, with its name, for one that has
    other tensors than the first.
    """
    every = iter(named)
    first_name, first = next(every)
    sums = {key: value.to(torch.float64, copy=True) for key, value in first.items() if value.is_floating_point()}
    n_networks = 1
    for name, tensors in every:
        if fault := _fault(first, tensors):
            raise CheckpointError(
                name,
                expected=f"the same tensors as in {first_name}",
                found=fault,
                remedy="leave one out with --models",
            )
        for key, total in sums.items():
            total += tensors[key]
        n_networks += 1
    return {key: (sums[key] / n_networks).to(value.dtype) if key in sums else value for key, value in first.items()}


def _fault(first: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> str:
    """In which tensor a network differs from another so that they have no mean, or ''."""
    if missing := sorted(first.keys() - other.keys()):
        return f"no {missing[0]}"
    if more := sorted(other.keys() - first.keys()):
        return f"{more[0]}, which is not there"
    for key, value in first.items():
        ours, theirs = ((tuple(one.shape), str(one.dtype).removeprefix("torch.")) for one in (other[key], value))
        if ours != theirs:
            return f"{key} of {ours[1]} {ours[0]}, which is {theirs[1]} {theirs[0]} there"
        if not value.is_floating_point() and not key.endswith(_COUNTERS) and not torch.equal(value, other[key]):
            return f"another {key}"
    return ""


def _usable(subjects: Mapping[str, Subject], stage: str, work: Path) -> list[Checkpoint]:
    """The finished checkpoints of a stage, trained on these subjects as they are now; the others are named."""
    now = {name: digests(subject, work) | subject_digests(subject) for name, subject in subjects.items()}

    def fault(one: Checkpoint) -> str:
        if others := one.key["subjects"].keys() - now.keys():
            return f"it was trained on {', '.join(sorted(others))} too; ask for --subject all"
        own = {name: now[name] for name in one.key["subjects"]}
        return one.tree_fault(own) or ("" if one.finished else "its training is not finished; run it again")

    kept = []
    for one in list_checkpoints(work):
        if one.key["stage"] != stage or one.members or not one.key["subjects"].keys() & now.keys():
            continue
        if why := fault(one):
            say(f"left out {one.name}: {why}")
        else:
            kept.append(one)
    return kept


def _matching(known: list[Checkpoint], config: SoupConfig, work: Path) -> list[Checkpoint]:
    """Those that --models names, by their folder or by the training that is one over all folds."""
    if not known:
        raise CheckpointError(
            work / FOLDER,
            expected=f"finished {config.stage} checkpoints of this tree",
            found="none",
            remedy=f"run '{config.stage}' twice, with another --loss or --seed",
        )
    chosen = [one for one in known if any(fnmatchcase(n, p) for n in (one.name, one.training) for p in config.patterns)]
    if not chosen:
        raise ConfigError(
            "--models",
            expected=f"patterns that match one of: {', '.join(one.name for one in known)}",
            found=f"{config.models!r}",
            remedy="correct it",
        )
    return chosen


def _families(checkpoints: Sequence[Checkpoint]) -> list[list[Checkpoint]]:
    """All folds of the trainings that differ in settings alone; a family of one is named and left out."""
    families: dict[str, list[Checkpoint]] = {}
    for one in checkpoints:
        families.setdefault(_family(one), []).append(one)
    for family in families.values():
        if len({one.training for one in family}) < 2:
            say(
                f"left out {', '.join(one.name for one in family)}: a family of one training, where a mean is of two "
                "or more of the same stage, subject, backbone, size, start and folds"
            )
    return [family for family in families.values() if len({one.training for one in family}) > 1]


def _family(one: Checkpoint) -> str:
    """Equal for checkpoints that settings and the fold that is held out alone tell apart."""
    own = {name: value for name, value in one.key.items() if name not in ("settings", "devices", "start", "fold")}
    start = one.key["start"]["training"] or one.key["start"]["weights"]
    return fingerprint(own | {"start": start, "n_folds": one.fold["n_folds"], "seed": one.fold["seed"]})


def _groups(family: Sequence[Checkpoint]) -> list[list[Checkpoint]]:
    """What to average: a checkpoint of every member, of one fold and from the same weights. What lacks one is named."""
    trainings = sorted({one.training for one in family})
    found: dict[tuple[int, str], dict[str, Checkpoint]] = {}
    for one in family:  # a stage 1 that was trained again gives other weights to start from under the same key
        found.setdefault((one.fold["fold"], one.key["start"]["weights"]), {})[one.training] = one
    for (fold, _), there in found.items():
        if missing := [training for training in trainings if training not in there]:
            names = ", ".join(min(one.name for one in family if one.training == training) for training in missing)
            say(f"left out fold {fold} of {', '.join(one.name for one in there.values())}: none from there of {names}")
    whole = [there for _, there in sorted(found.items()) if len(there) == len(trainings)]
    return [[there[training] for training in trainings] for there in whole]


def _soup(subjects: Sequence[Subject], members: Sequence[Checkpoint], config: SoupConfig, work: Path) -> Soup:
    key = {**members[0].key, "settings": {"soup": [one.training for one in members]}}
    about = [_about(one) for one in members]
    label = label_of(key)
    path = checkpoint_path(work, label, key)
    weights = f"soup-{fingerprint({'members': about})}"  # of other weights elsewhere: what is there stays whole
    there = open_checkpoint(path) if (path / "checkpoint.json").exists() else None
    if there is not None and there.facts["weights"] == weights:
        say(f"already averaged, {path}")
        prune(there)
        return Soup(there, False)
    say(f"{label}: " + (_difference(members) if there is None else "averaged again: members have other weights now"))
    with only_writer(path):
        seen = np.unique(np.concatenate([one.seen_ids for one in members])).tolist()
        facts = {
            "label": label,
            "origin": members[0].facts["origin"],
            "versions": {"torch": torch.__version__},
            "taps": members[0].facts.get("taps"),
            "members": about,
            "seen_ids": seen,
        }
        backbone = mean_weights((one.name, one.backbone_tensors()) for one in members)
        heads = mean_weights((one.name, one.heads()) for one in members)
        score = _score(subjects, Checkpoint(path, key, facts), members[0], backbone, heads, config, work)
        facts |= {"scores": [score], "score": score, "weights": weights, "state": None, "finished": True}
        facts |= {"digests": save_weights(path / weights, backbone, heads)}
        soup = Soup(Checkpoint(path, key, facts), True)
        record(soup.checkpoint)
    below = f", below its best member by {soup.best - score:.4f}" if score < soup.best else ""
    say(f"{label}: scores {score:.4f} on fold {key['fold']['fold']}{below}")
    return soup


def _about(one: Checkpoint) -> dict[str, Any]:
    return {
        "name": one.name,
        "training": one.training,
        "score": one.facts["score"],
        "digests": one.facts.get("digests", {}),
    }


def _difference(members: Sequence[Checkpoint]) -> str:
    """The members by their trainings, and the settings that tell them apart."""
    settings = [one.key["settings"] for one in members]
    names = [name for name in settings[0] if any(one.get(name) != settings[0][name] for one in settings)]

    def words(one: Checkpoint) -> str:
        own = ", ".join(f"{name.replace('_', ' ')} {one.key['settings'].get(name)}" for name in names)
        return one.training + (f" ({own})" if own else "")

    return "mean of " + ", ".join(map(words, members))


def _score(
    subjects: Sequence[Subject],
    soup: Checkpoint,
    like: Checkpoint,
    backbone: Mapping[str, torch.Tensor],
    heads: Mapping[str, torch.Tensor],
    config: SoupConfig,
    work: Path,
) -> float:
    """On the held-out fold, as an epoch of training is scored, in float32. Raises LeakError.

    like : a member, whose layers and batch size it has
    """
    settings, network = TrainConfig(**like.key["settings"]), like.backbone(config.device)
    network.model.load_state_dict(dict(backbone))
    pixels = cache_pixels(subjects, network, work, config.image_cache, config.workers)
    images = Images(subjects, pixels, soup.fold)
    refuse_leak(soup.seen_ids, images.held_out_ids, f"fold {soup.fold['fold']} of {soup.facts['label']}")
    encoder = Encoder(network.model, SavedHeads(heads, subjects), network.taps(settings.tapped)).to(config.device)
    return HeldOut(images, network, settings.batch_size, make_accelerator("float32", config.device)).score(encoder)
