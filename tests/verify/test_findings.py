"""Every file of a work folder is looked at, and one that changed is found and made again."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import cli
from featcache.cache.store import open_store
from heads.verify.findings import FEATURES, HEADS, INDEXES, PREDICTIONS, verify
from heads.verify.repair import Line, lines_for, run_again, take_away


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def first(folder: Path, pattern: str) -> Path:
    return sorted(folder.glob(pattern))[0]


DAMAGES = {
    "a chunk": (lambda work: flip(first(work, "features.zarr/*/pooled/c/0/0")), FEATURES),
    "a chunk that is gone": (lambda work: first(work, "predictions.zarr/*/lh/c/0/0").unlink(), PREDICTIONS),
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


def test_of_a_damaged_store_rows_before_the_damage_stay(filled):
    path = first(filled, "predictions.zarr/*/lh/c/0/0")
    store = path.parents[3]
    flip(path)
    said = take_away(verify(filled, 1))
    assert said == [f"{store}: rows of lh from 0 on will be made again"]
    committed = open_store(store).committed
    assert committed["lh"] == 0 and committed["rh"] == len(open_store(store).image_ids)


def test_the_command_says_what_is_damaged_and_repairs_it(filled, capfd, monkeypatch):
    chunk, heads = first(filled, "features.zarr/*/pooled/c/0/0"), first(filled, "heads/*.safetensors")
    store, file = open_store(chunk.parents[3]), load_file(heads)
    rows = store.read("pooled")
    flip(chunk)
    flip(heads)
    assert cli.run(["verify", "--work", str(filled)]) == 1
    out, err = capfd.readouterr()
    assert "2 damaged" in out and "features: " in err and "heads: " in err
    # in this process: a new one takes seconds to load
    monkeypatch.setattr(
        "heads.verify.repair.subprocess.run", lambda words, **_: type("Done", (), {"returncode": cli.run(words[3:])})
    )
    assert cli.run(["verify", "--work", str(filled), "--repair", "--json"]) == 0
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert {line.split()[0] for line in result["again"]} == {"extract", "fit-heads"}
    assert not [finding for finding in verify(filled, 2) if finding.fault]
    np.testing.assert_allclose(store.read("pooled"), rows, atol=1e-5)  # computed in batches of other images
    again = load_file(heads)
    assert again.keys() == file.keys()
    for name, tensor in file.items():
        np.testing.assert_allclose(again[name], tensor, atol=1e-4)


def test_only_commands_that_ended_well_and_made_what_is_damaged_are_run_again(tmp_path):
    lines = [
        {
            "command": "extract",
            "arguments": ["--work", "old", "--size", "48"],
            "environment": {"FEATCACHE_WORK": "w"},
            "exit": 0,
        },
        {"command": "extract", "arguments": ["--work=other", "--size", "48"], "environment": {}, "exit": 0},
        {"command": "extract", "arguments": ["--size", "64"], "exit": 1},
        {"command": "blend", "arguments": [], "exit": 0},
        {"command": "blend", "arguments": ["--method", "nnls"], "exit": 0},
        {"command": ["no", "text"], "arguments": [], "exit": 0},
    ]
    (tmp_path / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "features.zarr/broken").mkdir(parents=True)
    (tmp_path / "submission").mkdir()
    (tmp_path / "submission/blend.safetensors").write_bytes(b"no blend")
    findings = verify(tmp_path, 1)
    assert lines_for(findings, tmp_path) == [
        Line(("extract", "--size", "48", "--work", str(tmp_path)), {"FEATCACHE_WORK": "w"}),
        Line(("blend", "--method", "nnls", "--work", str(tmp_path)), {}),
    ]
    assert lines_for([], tmp_path) == []


def test_the_first_command_that_fails_ends_a_repair(monkeypatch):
    ran = []

    def call(words, **_):
        ran.append(words[3:])
        return type("Done", (), {"returncode": len(ran) - 1})

    lines = [Line((name,), {}) for name in ("extract", "fit-heads", "blend")]
    monkeypatch.setattr("heads.verify.repair.subprocess.run", call)
    assert run_again(lines) == 1 and ran == [["extract"], ["fit-heads"]]


def test_no_folder_is_one_line(tmp_path, capfd):
    assert cli.run(["verify", "--work", str(tmp_path / "nowhere")]) == 1
    assert "expected a work folder; found no such folder" in capfd.readouterr().err
