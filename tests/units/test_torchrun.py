"""Trainings on several devices: the command line that starts them, and what comes back of it."""

import json
import sys

import pytest

from featcache.errors import StoreError
from heads.units import torchrun as module
from heads.units.torchrun import Devices

WORDS = ["pretrain", "--fold=0"]


@pytest.fixture
def python(tmp_path, monkeypatch):
    """A stand-in for Python that keeps its arguments, and prints what it is told to."""
    program = tmp_path / "python"

    def build(out="", err="", code=0):
        kept = f"import sys, json; json.dump(sys.argv, open({str(tmp_path / 'arguments')!r}, 'w'))"
        prints = f"sys.stdout.write({out!r}); sys.stderr.write({err!r}); sys.exit({code})"
        program.write_text(f"#!{sys.executable}\n{kept}\n{prints}\n")
        program.chmod(0o755)
        monkeypatch.setattr(module.sys, "executable", str(program))
        return lambda: json.loads((tmp_path / "arguments").read_text())[1:]

    return build


def test_processes_of_one_machine_meet_by_themselves(python):
    arguments = python("1 checkpoint\n" + json.dumps({"checkpoints": [{"path": "p"}]}) + "\n")
    outcome = Devices(processes=4).train("0123456789ab", WORDS)
    assert outcome.result == {"checkpoints": [{"path": "p"}]} and outcome.message == "1 checkpoint"
    assert arguments() == [
        *("-m", "torch.distributed.run", "--nproc-per-node=4", "--standalone", "-m", "featcache"),
        *(*WORDS, "--json"),
    ]


def test_machines_of_a_job_meet_at_the_first(monkeypatch):
    monkeypatch.setattr(module.socket, "gethostname", lambda: "node7")
    first, again, other = (Devices(2, 4)._launcher(unit) for unit in ("0123456789ab", "0123456789ab", "ba9876543210"))
    assert first == again != other
    assert first[:5] == ["srun", "--overlap", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1"]
    place = dict(one.split("=", 1) for one in first if "=" in one)
    assert (place["--nnodes"], place["--nproc-per-node"], place["--rdzv-id"]) == ("2", "4", "0123456789ab")
    host, port = place["--rdzv-endpoint"].split(":")
    assert host == "node7" and 1024 < int(port) < 65536


@pytest.mark.parametrize(
    ("out", "err", "code", "found"),
    [
        ("", "error: --batch-size: expected 16\nrest\n", 1, "--batch-size: expected 16"),
        ("", "Traceback\n", 3, "exit code 3"),
        ("no JSON\n", "", 0, "exit code 0"),
        ("", "", 0, "exit code 0"),
    ],
)
def test_a_training_that_fails_says_its_own_error(python, out, err, code, found):
    python(out, err, code)
    with pytest.raises(StoreError, match=f"pretrain by 2 processes: expected that they train; found {found}"):
        Devices(processes=2).train("0123456789ab", WORDS)


def test_one_device_needs_no_torchrun():
    assert not Devices().several
    assert Devices(nodes=2).several and Devices(processes=2).several


def test_more_than_a_pipe_takes_is_passed_on(python, capfd):
    python("x" * 200_000 + "\n{}\n", "y" * 200_000 + "\n")
    assert Devices(processes=2).train("0123456789ab", WORDS).result == {}
    assert [len(text) > 200_000 for text in capfd.readouterr()] == [True, True]
