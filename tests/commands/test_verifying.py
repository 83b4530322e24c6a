"""verify: what it says, and that --repair makes again what is damaged."""

import json

import numpy as np
from safetensors.numpy import load_file

import cli
from featcache.cache.store import open_store
from heads.verify.findings import verify
from support.damage import first, flip


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


def test_no_folder_is_one_line(tmp_path, capfd):
    assert cli.run(["verify", "--work", str(tmp_path / "nowhere")]) == 1
    assert "expected a work folder; found no such folder" in capfd.readouterr().err
