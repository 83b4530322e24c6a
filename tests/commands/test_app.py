"""What every command line can ask for: help, versions, completion, quiet."""

import errno
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import cli
from featcache import __version__
from heads.commands import app
from heads.commands.app import COMMANDS
from support.commands import SMALL

ROOT = Path(__file__).resolve().parents[2]
NAMES = [name for group in COMMANDS.values() for name in group]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spelling", ["-h", "--help"])
def test_every_command_explains_itself(name, spelling, capfd):
    assert cli.run([name, spelling]) == 0
    out = capfd.readouterr().out
    assert f"{name} " in out and "--quiet" in out and "--json" in out


def test_help_lists_every_command_in_its_group(capfd):
    assert cli.run(["-h"]) == 0
    out = capfd.readouterr().out
    places = [out.index(f"─ {group} ─") for group in COMMANDS]
    assert places == sorted(places) and all(f"│ {name} " in out for name in NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("name", [None, *NAMES])
def test_help_fits_on_80_columns(name, monkeypatch, capfd):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.run([*([name] if name else []), "--help"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) > 10 and max(map(len, lines)) <= 80 and not any("…" in line for line in lines)


def test_versions(capfd):
    assert cli.run(["--version"]) == 0
    said = capfd.readouterr().out.strip()
    assert said == f"featcache {__version__}, torch {version('torch')}, timm {version('timm')}"


def test_quiet_silences_progress_and_not_the_result(tiny, tmp_path, monkeypatch, capfd):
    for name, value in SMALL.items():
        monkeypatch.setenv(name, value)
    where = ("--data", str(tiny), "--work", str(tmp_path))
    assert cli.run(["extract", *where, "--subject", "1", "--quiet"]) == 0
    out, err = capfd.readouterr()
    assert err == "" and out.startswith("1 store, 35 new images")
    assert cli.run(["fit-heads", "--data", "nowhere", "--quiet"]) == 1
    assert capfd.readouterr().err.startswith("error: --data: expected")
    assert cli.run(["extract", *where]) == 0 and capfd.readouterr().err != ""


def test_names_of_earlier_versions_still_work(tmp_path, capfd):
    assert cli.run(["fit-heads", "--solver", "exact", "--seed", "-1"]) == 1
    assert "--fold-seed: expected 0 or more" in capfd.readouterr().err
    assert cli.run(["blend", "--recipe", "cake"]) == 1
    assert "--preset: expected one of best, paper; found 'cake'" in capfd.readouterr().err
    nowhere = ("--data", str(tmp_path / "nowhere"))
    for old in (("pretrain", "--recipe", "paper", "--head", "pooled"), ("fit-heads", "--layers", "joint")):
        assert cli.run([*old, *nowhere]) == 1
        assert "--data: expected a dataset" in capfd.readouterr().err


def complete(line: str) -> list[str]:
    """What a shell offers after this line."""
    words = {"_FEATCACHE_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
    command = [sys.executable, "-c", "import sys; sys.argv = ['featcache']; import cli; cli.main()"]
    done = subprocess.run(command, env=os.environ | words, capture_output=True, text=True, cwd=ROOT)
    return done.stdout.split()


@pytest.mark.slow
def test_a_shell_completes_commands_and_options():
    assert complete("featcache ext") == ["extract"]
    assert complete("featcache fit-heads --fold") == ["--folds", "--fold-seed"]


@pytest.mark.slow
def test_help_waits_for_nothing_heavy():
    code = "import sys, cli; cli.run(['fit-heads', '--help']); print(*{'torch', 'numpy', 'zarr'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == ""


@pytest.mark.parametrize(
    ("text", "is_memory"),
    [
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes", True),
        ("CUDA out of memory. Tried to allocate 8 bytes", True),
        ("unsupported memory format", False),
    ],
)
def test_full_memory_is_one_line_and_other_faults_of_torch_stay_what_they_are(monkeypatch, capfd, text, is_memory):
    def fail(**_):
        raise RuntimeError(text)

    monkeypatch.setattr(app, "parser", lambda: fail)
    if is_memory:
        assert cli.run(["models"]) == 1
        assert capfd.readouterr().err.startswith(f"error: expected enough memory; found: {text}; lower --batch-size")
    else:
        with pytest.raises(RuntimeError, match=text):
            cli.run(["models"])


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "make room"),
        (errno.EROFS, "make the folder writable"),
        (errno.EISDIR, "rename it"),
        (errno.EFBIG, "ulimit -f"),
        (errno.EIO, "see to its disk"),
    ],
)
def test_what_the_system_refuses_is_one_line_with_a_remedy_of_its_own(monkeypatch, capfd, number, remedy):
    def fail(**_):
        raise OSError(number, os.strerror(number), "there/a.npy")

    monkeypatch.setattr(app, "parser", lambda: fail)
    assert cli.run(["models"]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: there/a.npy: expected to read and write there; found: {os.strerror(number)}; ")
    assert remedy in line and line.endswith("what was committed is intact")
