"""Blocks fit into what a fit may take, and what cannot fit is refused."""

import pytest

import featcache.machine.memory
from featcache.errors import ConfigError
from featcache.machine.memory import block_that_fits, spare_memory


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """3 GB are free, and 1 GB was taken before the first fit."""
    monkeypatch.setattr(featcache.machine.memory, "free_memory", lambda: 3e9)
    monkeypatch.setattr(featcache.machine.memory, "memory_at_start", lambda: 1e9)


@pytest.mark.parametrize(("most", "spare"), [(0, 3e9), (2, 1e9), (100, 3e9)])
def test_a_cap_is_of_the_whole_process(most, spare):
    assert spare_memory(most) == spare


@pytest.mark.parametrize(
    ("fixed", "per_vertex", "most", "block"),
    [(1e9, 1e5, 0, 2048), (1e9, 2e6, 0, 1000), (0.5e9, 1e6, 2, 500), (2.9e9, 1e8, 0, 64), (9e9, 1, 0, 64)],
    ids=["all fit", "some fit", "capped", "the least", "too much, but only a guess"],
)
def test_blocks_fill_what_there_is(fixed, per_vertex, most, block):
    assert block_that_fits(fixed, per_vertex, 2048, most) == block


def test_a_cap_that_nothing_fits_under_is_refused():
    with pytest.raises(ConfigError, match=r"--max-memory: expected 2\.11 GB or more .* found 2; give more"):
        block_that_fits(1.04e9, 1e6, 2048, 2)


def test_a_small_head_takes_its_few_vertices():
    assert block_that_fits(1e9, 1e5, 7, 0) == 7
