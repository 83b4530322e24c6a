"""What is damaged is taken away, and the commands that made it are run again."""

import json
import os

import cli
from featcache.cache.store import open_store
from featcache.workdir import Workdir
from heads.verify.findings import verify
from heads.verify.repair import Line, lines_for, run_again, take_away
from support.damage import first, flip


def test_of_a_damaged_store_rows_before_the_damage_stay(filled):
    path = first(filled, "predictions.zarr/*/lh/c/0/0")
    store = path.parents[3]
    flip(path)
    said = take_away(verify(filled, 1))
    assert said == [f"{store}: damaged rows of lh from 0 on are made again"]
    committed = open_store(store).committed
    assert committed["lh"] == 0 and committed["rh"] == len(open_store(store).image_ids)


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
        {"command": "blend", "arguments": ["--method", "nnls"], "exit": 0, "folder": "/there"},
        {"command": ["no", "text"], "arguments": [], "exit": 0},
    ]
    (tmp_path / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "features.zarr/broken").mkdir(parents=True)
    (tmp_path / "submission").mkdir()
    (tmp_path / "submission/blend.safetensors").write_bytes(b"no blend")
    findings = verify(tmp_path, 1)
    assert lines_for(findings, tmp_path) == [
        Line(("extract", "--size", "48", "--work", str(tmp_path)), {"FEATCACHE_WORK": "w"}),
        Line(("blend", "--method", "nnls", "--work", str(tmp_path)), {}, "/there"),
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


def test_a_repair_from_another_folder_finds_what_the_command_named_by_a_relative_path(
    filled, tiny, tmp_path, monkeypatch
):
    for name in ("FEATCACHE_DATA", "FEATCACHE_WORK"):
        monkeypatch.delenv(name)
    monkeypatch.chdir(tiny.parent)
    work = os.path.relpath(filled)
    assert cli.run(["blend", "--data", tiny.name, "--work", work]) == 0
    submission = Workdir(filled).submission
    whole = {path: path.read_bytes() for path in submission.glob("*/*.npy")}
    flip(Workdir(filled).saved_blend)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert cli.run(["verify", "--repair", "--work", os.path.relpath(filled)]) == 0
    assert {path: path.read_bytes() for path in submission.glob("*/*.npy")} == whole


def test_a_repair_that_fails_is_not_called_one_and_what_lacks_is_said_afterwards(filled, monkeypatch, capfd):
    flip(first(filled, "predictions.zarr/subj01-*/lh/c/0/0"))
    monkeypatch.setattr("heads.verify.repair.run_again", lambda lines: 1)
    assert cli.run(["verify", "--repair"]) == 1
    said = capfd.readouterr()
    assert "not repaired, since a command failed" in said.out + said.err
    assert cli.run(["verify"]) == 0
    said = capfd.readouterr()
    assert "0 damaged; 1 not complete" in said.out and "goes on with it" in said.err
