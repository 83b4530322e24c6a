"""Memory of the device in a training: said beforehand near to what it is, and one line where it is full."""

import re
from dataclasses import replace

import pytest
import torch

from featcache.errors import ConfigError
from heads.backbones.memory import refused_where_full
from support.training import QUICK, train

SIZES = {"kB": 1e3, "MB": 1e6, "GB": 1e9}


@pytest.mark.parametrize("settings", [{"precision": "float32"}, {"precision": "bfloat16"}, {"ema": 0.9}])
def test_what_is_said_beforehand_is_near_to_the_peak(tiny, tmp_path, pretended_cuda, capfd, settings):
    pretended_cuda.forget()
    train(tiny, tmp_path, replace(QUICK, batch_size=8, **settings), device="cuda")
    number, unit = re.search(r"about ([\d.]+) (.B) of the device's memory", capfd.readouterr().err).groups()
    assert 0.5 < float(number) * SIZES[unit] / pretended_cuda.peak < 2


def test_only_full_memory_is_called_that():
    with pytest.raises(ConfigError, match="expected enough memory for the weights"), refused_where_full("cuda"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
    with pytest.raises(RuntimeError, match="another"), refused_where_full("cuda"):
        raise RuntimeError("another mistake")
