"""Every file of a work folder is looked at, and one that changed is found."""

from pathlib import Path

import numpy as np
import pytest

import cli
from featcache.cache.store import create_store
from featcache.machine.documents import write_document
from featcache.machine.leases import Done, Leases, State
from featcache.workdir import Workdir
from heads.verify.findings import BLEND, COMPARISONS, FEATURES, HEADS, INDEXES, PREDICTIONS, verify
from support.damage import first, flip

DAMAGES = {
    "a chunk": (lambda work: flip(first(work, "features.zarr/*/pooled/c/0/0")), FEATURES),
    "a chunk that is gone": (lambda work: first(work, "predictions.zarr/*/lh/c/0/0").unlink(), PREDICTIONS),
    "a record of rows that is gone": (lambda work: first(work, "features.zarr/*/committed.json").unlink(), FEATURES),
    "a record of rows": (lambda work: flip(first(work, "features.zarr/*/committed.json")), FEATURES),
    "a description": (lambda work: flip(first(work, "predictions.zarr/*/zarr.json")), PREDICTIONS),
    "heads": (lambda work: flip(first(work, "heads/*.safetensors")), HEADS),
    "heads that are gone": (lambda work: first(work, "heads/*.safetensors").unlink(), HEADS),
    "an index": (lambda work: flip(first(work, "index/*.json")), INDEXES),
    "a leftover": (lambda work: (work / "heads/.3.a.safetensors").write_bytes(b"x"), ""),
}


def test_a_whole_folder_has_no_fault_and_nothing_is_changed(filled):
    before = {path: path.stat().st_mtime_ns for path in filled.rglob("*")}
    findings = verify(filled, 2)
    assert not [finding for finding in findings if finding.fault]
    assert all(finding.sealed for finding in findings)
    assert {FEATURES, PREDICTIONS, HEADS, INDEXES} <= {finding.kind for finding in findings}
    assert {path: path.stat().st_mtime_ns for path in filled.rglob("*")} == before


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_changed_is_found(filled, damage):
    hurt, kind = DAMAGES[damage]
    hurt(filled)
    faulty = [finding for finding in verify(filled, 2) if finding.fault]
    assert {finding.kind for finding in faulty} == ({kind} if kind else set())


def test_chunks_of_two_stores_that_changed_places_are_found(filled):
    one, other = sorted(filled.glob("predictions.zarr/subj01-*/lh/c/0/0"))[:2]
    other_rows = other.read_bytes()
    other.write_bytes(one.read_bytes())
    one.write_bytes(other_rows)
    assert [finding.fault for finding in verify(filled, 1) if finding.fault] == [
        "it is of another array, or of other rows"
    ] * 2


@pytest.mark.parametrize("hurt", [flip, Path.unlink])
def test_every_file_that_is_handed_in_or_read_again_is_looked_at(filled, hurt):
    assert cli.run(["blend"]) == 0
    files = Workdir(filled)
    assert not [finding for finding in verify(filled, 1) if finding.fault]
    predictions = sorted(files.submission.glob("*/*_pred_test.npy"))
    assert len(predictions) == 4
    for path in (*predictions, files.submission_zip, files.saved_blend, files.blend_weights, files.blend_files):
        whole = path.read_bytes()
        hurt(path)
        faulty = [finding for finding in verify(filled, 1) if finding.fault]
        assert path in {finding.path for finding in faulty} and {finding.kind for finding in faulty} == {BLEND}
        path.write_bytes(whole)
    assert not [finding for finding in verify(filled, 1) if finding.fault]


def test_a_submission_of_an_earlier_version_is_looked_at_without_its_checksums(filled, monkeypatch):
    assert cli.run(["blend"]) == 0
    files = Workdir(filled)
    files.blend_files.unlink()
    monkeypatch.setattr("heads.verify.findings.has_checksum", lambda path: False)  # nor had the blend one
    findings = verify(filled, 1)
    assert not [finding for finding in findings if finding.fault]
    assert [finding.sealed for finding in findings if finding.path == files.blend_files] == [False]
    flip(files.submission_zip)
    assert {finding.path for finding in verify(filled, 1) if finding.fault} == {files.submission_zip}


def test_heads_of_two_stores_that_changed_places_are_found(filled):
    one, other = sorted(filled.glob("heads/subj01-*.safetensors"))[:2]
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    faulty = [finding for finding in verify(filled, 1) if finding.fault]
    assert [finding.path for finding in faulty] == [one, other]
    assert all(finding.fault.startswith("those of subj01-") for finding in faulty)


def test_a_comparison_whose_subjects_are_not_put_together_is_not_complete(tmp_path):
    folder = tmp_path / "compared/layers-abc"
    folder.mkdir(parents=True)
    np.savez(folder / "subj01.npz", values=np.arange(3))
    findings = verify(tmp_path, 1)
    assert [(one.path, one.fault, one.complete) for one in findings] == [
        (folder / "subj01.npz", "", True),
        (folder, "", False),
    ]
    write_document(folder / "shares.json", {"keys": {"subj01": {}}})
    assert all(one.complete and not one.fault for one in verify(tmp_path, 1))


def test_a_store_that_was_only_begun_is_not_complete_and_not_damaged(tmp_path):
    create_store(tmp_path / "features.zarr", "a", {"a": 1}, np.arange(3), 3, {"x": 2}, {})
    (finding,) = [one for one in verify(tmp_path, 1) if one.kind == FEATURES]
    assert not finding.fault and not finding.complete
    first(tmp_path, "features.zarr/*/zarr.json").with_name("committed.json").unlink()
    assert not [one for one in verify(tmp_path, 1) if one.fault]  # as an earlier version left it


def test_a_damaged_record_of_a_unit_is_found(tmp_path):
    leases = Leases(Workdir(tmp_path).units)
    for unit in ("0123456789ab", "ba9876543210"):
        leases.take(unit, State()).finish(Done(unit, {}, 1.0, "here", "done", {}))
    assert not [one for one in verify(tmp_path, 1) if one.fault]
    damaged = Workdir(tmp_path).units / "0123456789ab.done"
    damaged.write_text(damaged.read_text().replace("here", "hare"))
    assert [(one.path, one.fault) for one in verify(tmp_path, 1) if one.fault] == [
        (damaged, "it is not what was written")
    ]


def test_a_comparison_that_lacks_a_subject_is_found(tmp_path):
    path = tmp_path / "compared/layers-abc/shares.json"
    path.parent.mkdir(parents=True)
    write_document(path, {"keys": {"subj01": {}}})
    np.savez(path.with_name("subj01.npz"), a=np.arange(3))
    assert not [one for one in verify(tmp_path, 1) if one.fault]
    path.with_name("subj01.npz").unlink()
    (finding,) = [one for one in verify(tmp_path, 1) if one.fault]
    assert (finding.kind, finding.owner) == (COMPARISONS, path) and "subj01.npz" in finding.fault
