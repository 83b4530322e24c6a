"""Non-negative least squares of very many small problems at once, from their normal equations.

Block principal pivoting: guess which variables are above zero, solve for them, exchange those that turn out wrong, all
at once while that leaves fewer of them, else one by one, which always ends (Kim and Park 2011, Fast nonnegative matrix
factorization, https://doi.org/10.1137/110821172). A step is one batch of linear systems for all problems together that
are not yet solved.
"""

import numpy as np

from heads.blend.products import of_tiles

_TILE = 512  # problems at a time: their matrices stay in a cache
_PATIENCE = 3  # exchanges of whole blocks that may leave as many wrong variables as before
_STEPS = 20  # for each variable, at most: rounding could exchange the same two for ever
_RIDGE = 1e-9  # parts of the mean diagonal: equal columns share what one of them would have
_TOLERANCE = 1e-10  # parts of the largest right side


def nnls(gram: np.ndarray, cross: np.ndarray) -> np.ndarray:
    """argmin over x >= 0 of x' gram x / 2 - cross' x, for each problem.

    Parameters
    ----------
    gram : (n_problems, n_variables, n_variables), symmetric and positive semi-definite
    cross : (n_problems, n_variables)

    Returns
    -------
    x : (n_problems, n_variables) float64. Where columns depend on each other, the solution of least norm, nearly
    """

    def of_tile(tile: slice) -> np.ndarray:
        return _solve(gram[tile].astype(np.float64), cross[tile].astype(np.float64))

    return np.concatenate([np.zeros((0, cross.shape[1])), *of_tiles(of_tile, len(cross), _TILE)])


def _solve(gram: np.ndarray, cross: np.ndarray) -> np.ndarray:
    n_variables = cross.shape[1]
    size = np.einsum("pvv->p", gram) / n_variables
    gram = gram + (_RIDGE * np.where(size > 0, size, 1))[:, None, None] * np.eye(n_variables)
    tolerance = _TOLERANCE * np.abs(cross).max(1, keepdims=True)
    x, above = np.zeros(cross.shape), cross > 0
    fewest, patience = np.full(len(cross), n_variables + 1), np.full(len(cross), _PATIENCE)
    left = np.arange(len(cross))
    for _ in range(_STEPS * n_variables):
        if not len(left):
            break
        now = above[left]
        solved = _least_squares(gram[left], cross[left], now)
        slope = np.einsum("pvw,pw->pv", gram[left], solved) - cross[left]
        wrong = np.where(now, solved < -tolerance[left], slope < -tolerance[left])
        n_wrong = wrong.sum(1)
        x[left] = solved
        better = n_wrong < fewest[left]
        patience[left] = np.where(better, _PATIENCE, patience[left] - 1)
        fewest[left] = np.minimum(n_wrong, fewest[left])
        last = n_variables - 1 - np.argmax(wrong[:, ::-1], axis=1)
        one = wrong & (np.arange(n_variables) == last[:, None])
        above[left] = now ^ np.where((patience[left] >= 0)[:, None], wrong, one)
        left = left[n_wrong > 0]
    return np.maximum(x, 0)


def _least_squares(gram: np.ndarray, cross: np.ndarray, above: np.ndarray) -> np.ndarray:
    """Of the variables above zero; the others are 0."""
    both = above[:, :, None] & above[:, None]
    system = np.where(both, gram, np.eye(cross.shape[1]))
    return np.linalg.solve(system, np.where(above, cross, 0)[..., None])[..., 0]
