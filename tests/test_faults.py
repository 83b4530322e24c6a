"""The scripts of benchmarks/faults/ at a small size: each exits with 1 where a promise was broken."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("--stages", "simulate,extract,fit-ridge,blend")
SCRIPTS = {
    "kill": ("--n", "4", *STAGES),
    "disk": ("--n", "4", *STAGES),
    "same": ("--n", "1", *STAGES),
    "long": ("--n", "60"),
    "corruption": ("--n", "6", "--repair", "2"),
    "fuzz": ("--n", "90", "--readers", "npy,npz,zarr,nifti,table,recipe,weights,hub,features elsewhere"),
    "scales": ("--n", "2"),
    "tokens": ("--networks", "vit_tiny_patch16_224,vit_medium_patch16_rope_reg1_gap_256"),
    "networks": ("--networks", "mvitv2_tiny", "--sizes", "112,100"),
}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="stages are forked from one process that has loaded everything")
@pytest.mark.parametrize("script", SCRIPTS)
def test_no_promise_is_broken_in_a_few_cases(script):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    line = [sys.executable, str(ROOT / "benchmarks" / "faults" / f"{script}.py"), *SCRIPTS[script]]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
