"""Blends at once through the program, with and without locks; benchmarks/faults/pairs.py does so with every stage."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STAGES = "simulate,extract,fit-each,fit-core,blend,blend-again"


@pytest.mark.slow
@pytest.mark.parametrize("locks", ["system", "none"])
def test_what_two_stages_at_once_leave_is_of_one_of_them(locks):
    script = [sys.executable, str(ROOT / "benchmarks" / "faults" / "pairs.py"), "--locks", locks]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    given = ["--stages", STAGES, "--only", "blend,blend-again", "--n", "3"]
    done = subprocess.run([*script, *given], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pairs 3, broken 0" in done.stdout
