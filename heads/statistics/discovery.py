"""False discovery rate over vertices."""

import numpy as np
from scipy.stats import false_discovery_control


def q_values(p: np.ndarray, method: str = "bh") -> np.ndarray:
    """q of each p, of any shape: the smallest false discovery rate at which it is among the discoveries.

    bh : Benjamini and Hochberg 1995, for tests that are independent or positively dependent, as those of vertices are
    by : Benjamini and Yekutieli 2001, for any dependence, and stricter
    """
    if not p.size:
        return p.copy()
    return np.asarray(false_discovery_control(p, axis=None, method=method)).reshape(p.shape)
