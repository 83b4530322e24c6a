"""A challenge tree whose ground truth is known: images are drawn, responses are planted in them.

config    the counts, checked when built, and the random streams that follow from the seed
scenes    image id -> scene -> pixels
features  pixels and scene -> the feature bank, one row per image
anatomy   fsaverage vertices, ROIs, and the receptive field of every vertex
truth     which bank features drive which vertex, how reliably, and the responses that follow
tree      all of it written in the challenge's layout, with the truth beside it
"""

from featcache.simulate.config import SimulateConfig
from featcache.simulate.tree import simulate

__all__ = ["SimulateConfig", "simulate"]
