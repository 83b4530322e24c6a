"""A challenge tree with a known ground truth: images are drawn, and responses are computed from them.

config    counts, and the random streams of a seed
scenes    image id -> scene -> pixels
features  pixels and scene -> the feature bank, one row per image
anatomy   fsaverage vertices, ROIs, and the receptive field of every vertex
truth     weights of the features in every vertex, noise ceilings, and the responses that follow
tree      files in the challenge's layout, with the truth beside them
"""

from featcache.simulate.config import SimulateConfig
from featcache.simulate.tree import simulate

__all__ = ["SimulateConfig", "simulate"]
