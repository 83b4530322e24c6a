"""What is damaged is taken away, and the commands that made it are run again."""

import json

from featcache.cache.store import open_store
from heads.verify.findings import verify
from heads.verify.repair import Line, lines_for, run_again, take_away
from support.damage import first, flip


def test_of_a_damaged_store_rows_before_the_damage_stay(filled):
    path = first(filled, "predictions.zarr/*/lh/c/0/0")
    store = path.parents[3]
    flip(path)
    said = take_away(verify(filled, 1))
    assert said == [f"{store}: rows of lh from 0 on will be made again"]
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
