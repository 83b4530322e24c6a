"""Settings of engines: what cannot work is refused before anything is started."""

import pytest

from featcache.errors import ConfigError
from heads.config import EngineConfig


@pytest.mark.parametrize(
    ("time", "minutes"), [("90", 90), ("90min", 90), ("90m", 90), ("8h", 480), ("1.5 h", 90), ("2d", 2880), ("1", 1)]
)
def test_a_time_is_in_minutes_hours_or_days(time, minutes):
    assert EngineConfig(time=time).minutes == minutes


@pytest.mark.parametrize("time", ["", "h", "8 hours", "-1h", "0h", "0.5min", "8:00:00", "1e9h"])
def test_another_time_is_refused(time):
    with pytest.raises(ConfigError, match=r"--time: expected such as 90min, 8h or 2d"):
        EngineConfig(time=time)


def test_options_of_sbatch_are_pairs():
    config = EngineConfig(slurm=("qos=long", "--mail-type=END", "constraint=a=b"))
    assert config.sbatch == {"qos": "long", "mail_type": "END", "constraint": "a=b"}
    for wrong in ("qos", "=long", ""):
        with pytest.raises(ConfigError, match="--slurm: expected NAME=VALUE"):
            EngineConfig(slurm=(wrong,))


@pytest.mark.parametrize(
    "settings",
    [
        {"engine": "slurm"},
        {"interrupt": "stop"},
        {"cluster": "pbs"},
        {"attempts": 0},
        {"workers": -1},
        {"nodes": 0},
        {"gpus": -1},
        {"cpus": -1},
        {"processes": -1},
        {"memory": -0.5},
        {"lost_after": 0},
        {"lost_after": float("nan")},
        {"engine": "dask"},
    ],
)
def test_settings_that_cannot_work_are_refused(settings):
    with pytest.raises(ConfigError):
        EngineConfig(**settings)
