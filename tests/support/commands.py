"""Commands as a user runs them, in this process."""

import json

import pytest

import cli
from heads.recipes.jobs import Job

SMALL = {"FEATCACHE_BACKBONE": "test_resnet", "FEATCACHE_WEIGHTS": "none", "FEATCACHE_SIZE": "48"}


def run(capfd: pytest.CaptureFixture[str], *arguments: str) -> dict:
    """Run a command that must succeed; its JSON."""
    code = cli.run([*arguments, "--json"])
    out, err = capfd.readouterr()
    assert code == 0, err
    return json.loads(out.splitlines()[-1])


def fails(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must fail; the one line it says."""
    code = cli.run(list(arguments))
    out, err = capfd.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(errors) == 1 and err.splitlines()[-1] == errors[0], (code, out, err)
    return errors[0]


def job_of(*arguments: str) -> Job:
    """A command line that was read and not run."""
    job = cli.app(args=list(arguments), standalone_mode=False)
    assert isinstance(job, Job)
    return job
