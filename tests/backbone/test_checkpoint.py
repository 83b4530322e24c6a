import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

from featcache.backbone.checkpoint import (
    Checkpoint,
    find_checkpoint,
    list_checkpoints,
    load_state,
    open_checkpoint,
    prune,
    record,
    save_state,
    save_weights,
    siblings,
    usable,
)
from featcache.backbone.keys import Split
from featcache.backbone.network import load_backbone
from featcache.config import FITS, BackboneConfig
from featcache.dataset.algonauts import open_challenge
from featcache.dataset.image_lists import SubjectDigests
from featcache.dataset.images import load_image
from featcache.dataset.subject import Subject
from featcache.errors import BackboneError, CheckpointError
from featcache.workdir import Workdir
from support.checkpoints import HEADS, N_FOLDS, mean_like, trained_weights, write_checkpoint

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def subjects(tiny: Path) -> tuple[Subject, ...]:
    return open_challenge(tiny).subjects


@pytest.fixture
def made(subjects: tuple[Subject, ...], tmp_path: Path) -> Checkpoint:
    return write_checkpoint(subjects, tmp_path)


@pytest.fixture
def said(said: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr("featcache.backbone.checkpoint.say", said.append)
    return said


def images(size: int, n_images: int = 2) -> torch.Tensor:
    return torch.randn(n_images, 3, size, size, generator=torch.Generator().manual_seed(0))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def damage(path: Path, n_bytes: int = 100) -> None:
    path.write_bytes(path.read_bytes()[:-n_bytes])


def raising(error: Exception) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


def test_what_was_recorded_is_opened_again(made):
    again = open_checkpoint(made.path)
    assert again == made and again.name == made.path.name and again.finished
    assert again.fold == 0 and again.key.split == Split(fold=0, n_folds=N_FOLDS, seed=0)
    assert again.seen_ids.dtype == np.int64 and tuple(again.seen_ids.tolist()) == made.facts.seen_ids


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_the_backbone_comes_back_with_its_weights(subjects, tmp_path, name):
    made = write_checkpoint(subjects, tmp_path, name=name)
    trained = load_backbone(BackboneConfig(name=name, weights="none", size=48))
    untrained = trained.pooled(images(48))
    trained.model.load_state_dict(trained_weights(trained, seed=0))
    expected = trained.pooled(images(48))
    again = made.backbone()
    assert torch.equal(again.pooled(images(48)), expected)
    assert not torch.allclose(expected, untrained)
    assert again.transform_settings == trained.transform_settings and again.origin == f"checkpoint {made.name}"


def test_the_heads_come_back_as_they_were(made):
    again = made.heads()
    assert again.keys() == HEADS.keys() and all(torch.equal(again[key], HEADS[key]) for key in HEADS)
    assert all(again[key].dtype == HEADS[key].dtype for key in HEADS)


def test_the_backbone_loads_at_another_size(made):
    here, there = made.backbone(), made.backbone(size=64)
    assert (here.transform_settings["input_size"], there.transform_settings["input_size"]) == ([3, 48, 48], [3, 64, 64])
    assert here.digest == there.digest and there.pixels(Image.new("RGB", (32, 32))).shape == (3, 64, 64)
    batch = images(64)
    assert torch.equal(*(one.pooled(batch) for one in (here, there)))


@pytest.mark.parametrize("fit", FITS)
def test_the_backbone_reads_images_as_it_was_trained_to_unless_it_is_asked(subjects, tmp_path, fit):
    made = write_checkpoint(subjects, tmp_path, fit=fit)
    picture = load_image(subjects[0].train.sources[0]).resize((90, 60))
    for asked in (None, *FITS):
        expected = load_backbone(BackboneConfig(name="test_resnet", weights="none", size=48, fit=asked or fit))
        found = made.backbone(fit=asked)
        assert found.transform_settings == expected.transform_settings
        assert torch.equal(found.pixels(picture), expected.pixels(picture))


def test_a_transformer_loads_at_another_size_with_its_positions_interpolated(subjects, tmp_path):
    made = write_checkpoint(subjects, tmp_path, name="test_vit", size=64)
    weights = made.backbone().model.state_dict()
    found = made.backbone(size=96)
    expected = resample_abs_pos_embed(weights["pos_embed"], [6, 6], num_prefix_tokens=1)
    assert weights["pos_embed"].shape[1] == 1 + 4 * 4 and torch.equal(found.model.pos_embed, expected)
    reference = timm.create_model("test_vit", num_classes=0, img_size=96).eval()
    reference.load_state_dict(weights | {"pos_embed": expected})
    with torch.no_grad():
        rows = reference(images(96))
    torch.testing.assert_close(found.pooled(images(96)), rows, rtol=1e-4, atol=1e-5)


def test_recording_removes_folders_that_are_no_longer_named(made):
    for folder in ("epoch-002", "state-001-000000", "state-001-000004"):
        (made.path / folder).mkdir()
        (made.path / folder / "file").write_text("x")
    record(replace(made, facts=replace(made.facts, state="state-001-000004")))
    left = {path.name for path in made.path.iterdir()}
    assert left == {"checkpoint.json", "epoch-001", "state-001-000004"}
    (made.path / "epoch-002").mkdir()
    record(replace(made, facts=replace(made.facts, weights="epoch-002")))
    assert {path.name for path in made.path.iterdir()} == {"checkpoint.json", "epoch-002"}


def test_recording_keeps_what_is_named_as_it_was(made):
    before = files(made.path)
    record(made)
    assert files(made.path) == before


def test_a_run_that_stopped_before_its_record_is_no_checkpoint(subjects, tmp_path):
    save_weights(Workdir(tmp_path).checkpoints / "pretrain-x-fold0-abc" / "epoch-001", HEADS, HEADS)
    assert list_checkpoints(tmp_path) == [] and list_checkpoints(tmp_path / "nowhere") == []


def test_checkpoints_are_listed_by_name_and_found_by_name_or_path(subjects, tmp_path):
    second, first = (write_checkpoint(subjects, tmp_path, fold=fold) for fold in (1, 0))
    assert [one.name for one in list_checkpoints(tmp_path)] == [first.name, second.name]
    assert find_checkpoint(tmp_path, second.name) == second
    assert find_checkpoint(tmp_path / "elsewhere", str(second.path)) == second
    with pytest.raises(CheckpointError, match=r"found no checkpoint.json; name a folder in checkpoints"):
        find_checkpoint(tmp_path, "pretrain-x")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "expected a checkpoint's folder; found no checkpoint.json"),
        (b"", r"checkpoint.json cannot be read \(it .*\); delete it and train it again"),
        (b'{"format": 1, "recipe"', r"checkpoint.json cannot be read \(it .*\); delete it and train it again"),
        (b"\xff\xfe", r"checkpoint.json cannot be read \(it .*\); delete it and train it again"),
        (b"[]", r"checkpoint.json cannot be read \(it .*\); delete it and train it again"),
        (b'{"format": 1, "recipe": {}}', r"checkpoint.json cannot be read \(it .*\); delete it and train it again"),
        (b'{"format": 7, "recipe": {}, "facts": {}}', r"it is of format 7, and not 1\); delete it and train it again"),
    ],
)
def test_a_description_that_is_not_one_is_refused_in_one_line(made, content, problem):
    about = made.path / "checkpoint.json"
    about.unlink() if content is None else about.write_bytes(content)
    with pytest.raises(CheckpointError, match=problem) as found:
        open_checkpoint(made.path)
    assert "\n" not in str(found.value) and str(made.path) in str(found.value)


def test_a_folder_that_is_missing_or_is_a_file_is_refused(made, tmp_path):
    for path in (tmp_path / "nowhere", made.path / "checkpoint.json"):
        with pytest.raises(CheckpointError, match=f"{path}: expected a checkpoint's folder"):
            open_checkpoint(path)


@pytest.mark.parametrize("part", ["backbone", "heads"])
@pytest.mark.parametrize("how", ["truncated", "a bit", "another's"])
def test_weights_that_are_not_what_was_written_are_refused(made, subjects, tmp_path, part, how):
    """A bit of a weight, or another fold's file, would load and predict, and nobody would know."""
    path = made.path / "epoch-001" / f"{part}.safetensors"
    if how == "truncated":
        damage(path)
    elif how == "a bit":
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    elif part == "backbone":
        other = write_checkpoint(subjects, tmp_path / "elsewhere", fold=1)
        path.write_bytes((other.path / "epoch-001" / path.name).read_bytes())
    else:
        save_file({key: value + 1 for key, value in HEADS.items()}, path)
    with pytest.raises(CheckpointError, match=f"found that {path.name} is not what was written; delete it") as found:
        getattr(open_checkpoint(made.path), part)()
    assert "\n" not in str(found.value) and str(made.path) in str(found.value)


def without_digests(made):
    """As checkpoints were before their facts had any."""
    return replace(made, facts=replace(made.facts, digests={}))


def test_an_older_checkpoint_without_digests_still_loads(made):
    record(without_digests(made))
    again = open_checkpoint(made.path)
    assert "digests" not in again.facts.to_json() and again.heads().keys() == HEADS.keys()
    assert again.backbone().digest == made.backbone().digest


def test_truncated_weights_are_refused_without_digests_too(made):
    made = without_digests(made)
    damage(made.path / "epoch-001" / "backbone.safetensors")
    with pytest.raises(BackboneError, match=r"found .*backbone.safetensors, which cannot be read") as found:
        made.backbone()
    damage(made.path / "epoch-001" / "heads.safetensors", 10)
    with pytest.raises(CheckpointError, match=r"heads.safetensors cannot be read .*delete it and train it again"):
        made.heads()
    assert "\n" not in str(found.value)


def test_weights_that_are_missing_are_refused(made):
    for name, load in (("backbone", made.backbone), ("heads", made.heads)):
        (made.path / "epoch-001" / f"{name}.safetensors").unlink()
        with pytest.raises(CheckpointError, match=f"expected a whole checkpoint; found that {name}.safetensors"):
            load()
    long = replace(made, facts=replace(made.facts, weights="x" * 5_000))
    with pytest.raises(CheckpointError, match=r"heads.safetensors is missing"):
        long.heads()


def test_a_run_without_a_finished_epoch_has_no_weights(made):
    early = replace(made, facts=replace(made.facts, weights=None))
    for load in (early.backbone, early.heads):
        with pytest.raises(CheckpointError, match="found a run without a finished epoch; run it again"):
            load()


def test_a_state_comes_back_as_it_was(tmp_path):
    optimiser = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))], lr=0.5)
    optimiser.param_groups[0]["params"][0].sum().backward()
    optimiser.step()
    state = {"epoch": 2, "step": 7, "model": HEADS, "optimiser": optimiser.state_dict(), "ema": None}
    save_state(tmp_path / "state-002-000007", state)
    again = load_state(tmp_path / "state-002-000007")
    torch.testing.assert_close(again, state, rtol=0, atol=0)


@pytest.mark.parametrize(
    "content",
    [None, b"", bytes(5000), b"PK\x03\x04" + bytes(100), b"text, not tensors"],
)
def test_a_damaged_state_is_refused(tmp_path, content):
    save_state(tmp_path / "state", {"model": HEADS})
    path = tmp_path / "state" / "state.pt"
    damage(path, 500) if content is None else path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"found that state/state.pt cannot be read \(.*\); delete it and train"):
        load_state(tmp_path / "state")


def test_a_state_that_is_missing_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"state.pt cannot be read"):
        load_state(tmp_path / "state")


class Attack:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.mkdir, (self.path,)


@pytest.fixture
def attack(tmp_path: Path) -> Path:
    save_state(tmp_path / "state", {"epoch": 1, "model": Attack(tmp_path / "made")})
    return tmp_path / "state"


def test_a_state_that_holds_code_runs_nothing(attack):
    with pytest.raises(Exception, match=r"state.pt cannot be read|Weights only load failed"):
        load_state(attack)
    assert not (attack.parent / "made").exists()


def test_a_state_that_holds_code_is_refused_in_one_line(attack):
    with pytest.raises(CheckpointError, match=r"state/state.pt cannot be read") as found:
        load_state(attack)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("error", [FULL, RuntimeError("I/O error: no space\n at line 3"), SafetensorError("I/O error")])
@pytest.mark.parametrize("fails_at", ["backbone", "heads"])
def test_a_full_disk_leaves_nothing_of_an_epoch_and_everything_of_the_last(made, monkeypatch, error, fails_at):
    before = files(made.path)

    def full(path: Path, tensors: dict[str, torch.Tensor], *_: object) -> None:
        if path.stem == fails_at:
            path.write_bytes(b"half")
            raise error
        save_file(tensors, path)

    monkeypatch.setattr("featcache.backbone.checkpoint.write_tensors", full)
    with pytest.raises(CheckpointError, match=r"expected to save epoch-002; found .* GB free\); make room"):
        save_weights(made.path / "epoch-002", HEADS, HEADS)
    assert not (made.path / "epoch-002").exists() and files(made.path) == before
    assert open_checkpoint(made.path).backbone().digest


@pytest.mark.parametrize(
    "error", [FULL, RuntimeError("[enforce fail at inline_container.cc] file write failed\nframe")]
)
def test_a_full_disk_leaves_nothing_of_a_state_and_everything_of_the_last(made, monkeypatch, error):
    save_state(made.path / "state-001-000000", {"epoch": 1})
    before = files(made.path)
    monkeypatch.setattr("featcache.backbone.checkpoint.torch.save", raising(error))
    with pytest.raises(CheckpointError, match="expected to save state-001-000004; found ") as found:
        save_state(made.path / "state-001-000004", {"epoch": 1})
    assert "\n" not in str(found.value) and files(made.path) == before
    assert load_state(made.path / "state-001-000000") == {"epoch": 1}


def test_weights_written_again_replace_what_a_killed_run_left(made):
    (made.path / "epoch-002").mkdir()
    (made.path / "epoch-002" / "backbone.safetensors").write_bytes(b"half")
    heads = {"linear.weight": torch.zeros(2, 3)}
    written = save_weights(made.path / "epoch-002", made.backbone().model.state_dict(), heads)
    later = replace(made, facts=replace(made.facts, weights="epoch-002", digests=written))
    assert torch.equal(later.heads()["linear.weight"], torch.zeros(2, 3))
    assert later.backbone().digest == made.backbone().digest


def test_a_training_is_one_over_its_folds(subjects, tmp_path):
    folds = [write_checkpoint(subjects, tmp_path, fold=fold) for fold in range(N_FOLDS)]
    assert len({one.training for one in folds}) == 1 and len({one.name for one in folds}) == N_FOLDS
    other = write_checkpoint(subjects, tmp_path, settings={"epochs": 3})
    assert [one.name for one in siblings(folds[1])] == sorted(one.name for one in folds)
    assert siblings(other) == [other]


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        (["images"], "one of other images of subj02"),
        (["responses"], "one of other responses of subj02"),
        (["images", "responses"], "one of other images and responses of subj02"),
    ],
)
def test_another_tree_is_named_by_what_differs(made, subjects, tmp_path, changed, found):
    current = {subject.name: SubjectDigests.of(subject, tmp_path) for subject in subjects}
    assert made.tree_fault(current) is None
    made.refuse_other_tree(current)
    now = current["subj02"]
    if "images" in changed:
        now = replace(now, images=replace(now.images, digests=now.images.digests[::-1]))
    if "responses" in changed:
        now = replace(now, responses="0")
    current["subj02"] = now
    assert made.tree_fault(current) == ("a checkpoint of this tree", found)
    assert made.tree_fault({"subj01": current["subj01"]}) is None
    message = f"{made.path}: expected a checkpoint of this tree; found {found}; choose another checkpoint, or train one"
    with pytest.raises(CheckpointError, match=message):
        made.refuse_other_tree(current)


def test_a_subject_that_it_was_not_trained_on_is_named(subjects, tmp_path):
    made = write_checkpoint(subjects[:1], tmp_path, stage="finetune")
    current = {subject.name: SubjectDigests.of(subject, tmp_path) for subject in subjects}
    assert made.tree_fault(current) == ("a checkpoint that was trained on subj02", "subj01")
    assert [made.concerns(subject) for subject in subjects] == [True, False]


def test_usable_are_the_finished_ones_of_this_tree_and_the_others_are_named(tree, tmp_path, said):
    subjects = open_challenge(tree).subjects
    work = tmp_path / "work"
    good, early = (write_checkpoint(subjects, work, fold=fold, finished=fold == 0) for fold in (0, 1))
    others = write_checkpoint(subjects[1:], work, stage="finetune")
    known = list_checkpoints(work)
    assert usable(subjects[0], known, SubjectDigests.of(subjects[0], work)) == [good]
    assert said == [f"subj01: left out {early.name}: its training is not finished; run the same command again"]
    path = subjects[1].response_paths["lh"]
    np.save(path, np.load(path) + 1)
    said.clear()
    assert usable(subjects[1], known, SubjectDigests.of(subjects[1], work)) == []
    assert sorted(said) == sorted(
        f"subj02: left out {one.name}: expected a checkpoint of this tree; found one of other responses of subj02"
        for one in (good, early, others)
    )


def test_a_record_is_json_that_anyone_can_read(made):
    description = json.loads((made.path / "checkpoint.json").read_text())
    assert len(description.pop("digest")) == 32
    assert description == {"format": 1, "recipe": made.key.to_json(), "facts": made.facts.to_json()}


def test_facts_that_do_not_say_which_images_it_saw_are_refused(made):
    """Nothing could be held out from it."""
    path = made.path / "checkpoint.json"
    description = json.loads(path.read_text())
    del description["facts"]["seen_ids"], description["digest"]
    path.write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match=r"checkpoint.json cannot be read"):
        open_checkpoint(made.path)


def test_a_mean_of_checkpoints_of_an_earlier_version_is_read(made, tmp_path):
    mean = mean_like(made, tmp_path)
    assert mean.key.mean_of == (made.training, "0123456789ab") and made.key.mean_of == ()
    assert mean.name.startswith("pretrain-test_resnet-soup-fold0-") and mean.facts.label == mean.key.label
    assert mean.finished and mean.training != made.training and siblings(mean) == [mean]
    assert mean.backbone().digest == made.backbone().digest and mean.heads().keys() == made.heads().keys()
    description = json.loads((mean.path / "checkpoint.json").read_text())
    assert mean.key.to_json() == description["recipe"] and mean.facts.to_json() == description["facts"]
    prune(mean)
    assert open_checkpoint(mean.path).heads()
