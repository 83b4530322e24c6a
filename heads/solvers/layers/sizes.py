"""Bytes of memory that fits under priors take, from counts alone: for solvers before they start, and plans."""

from dataclasses import dataclass

from heads.features.rows import BLOCK_BYTES
from heads.solvers.layers.axes import LANDMARKS, method_for
from heads.solvers.ridge import MAX_NUMBERS_AT_ONCE

SEARCH_IMAGES = 1024  # images of the sample on which priors are compared, at most
# priors that are computed exactly after that, for each surface and fold; under landmarks products are much larger
FINALISTS = {"images": 12, "features": 12, "landmarks": 8}
FINALISTS_TOGETHER = 10  # the same where all surfaces share them
VERTEX_BLOCK = 2048
AT_ONCE = 1024  # vertices that one core fits at a time, at most
_WEIGHTS_IN_MEMORY = 2e9  # of the weights of a surface; larger ones are held in files (featcache/machine/tensors.py)


@dataclass(frozen=True, kw_only=True)
class LayeredSizes:
    """Counts that decide the memory of a fit under priors.

    n_fit : images to fit to, for each held-out fold
    n_choices : separately chosen heads of a fold, at most
    n_scales : sets of scales of features (see FoldPlan.scale_rows)
    held_bytes : of features that are kept in memory
    n_responses : vertices of all surfaces, if they are known beforehand
    """

    n_train: int
    n_images: int
    n_fit: tuple[int, ...]
    n_choices: int
    n_scales: int
    n_features: int
    n_priors: int
    backbone_trained: bool
    held_bytes: float
    n_responses: int = 0

    @property
    def method(self) -> str:
        """'images', 'features' or 'landmarks' (see axes.py)."""
        return method_for(min(self.n_fit), self.n_features)

    @property
    def searched(self) -> bool:
        """Whether priors are first compared on rough kernels."""
        return self.n_priors > self.n_finalists

    @property
    def n_finalists(self) -> int:
        """Priors that are computed exactly for each fold, and for each surface unless they are chosen together."""
        return FINALISTS_TOGETHER if self.together else FINALISTS[self.method]

    @property
    def together(self) -> bool:
        """Whether priors are chosen for all surfaces at once, which then share their axes.

        With fewer vertices than images, axes are what takes time. With more, each surface gets priors of its own.
        """
        return 0 < self.n_responses <= min(self.n_fit)

    @property
    def folds_share(self) -> bool:
        """Whether folds that share scales share finalists (see search.py)."""
        return self.method == "landmarks"

    @property
    def n_columns(self) -> int:
        """Images whose prepared features are multiplied with those of all others."""
        return {"images": self.n_images, "features": 0, "landmarks": LANDMARKS}[self.method]

    @property
    def axes_bytes(self) -> float:
        """Bytes of the axes of each fold, and of the kernels or features that they come from, which folds may share."""
        n_final = min(self.n_finalists * self.n_choices, self.n_priors)
        shared = min(n_final * (self.n_scales if self.folds_share else len(self.n_fit)), self.n_priors * self.n_scales)
        n = self.n_images if self.method == "images" else min(LANDMARKS, self.n_features)
        of_folds = self.n_images * sum(self.n_fit) if self.method == "images" else n**2 * len(self.n_fit)
        return 4.0 * (shared * self.n_images * n + n_final * of_folds)

    @property
    def n_saved(self) -> int:
        """Number of sets of weights that are saved: one for the mean over folds, or one for each."""
        return len(self.n_fit) if self.backbone_trained else 1

    def saved_bytes(self, n_vertices: int) -> float:
        """Bytes of the saved weights of a surface."""
        return 4.0 * self.n_features * n_vertices * self.n_saved

    def memory(self, n_vertices: int) -> float:
        """Bytes that a fit of a surface takes: features, axes, predictions of every choice, responses."""
        block = min(n_vertices, VERTEX_BLOCK)
        n = min(LANDMARKS, self.n_features, self.n_images)
        prepared = 4.0 * self.n_scales * self.n_columns * self.n_features
        decomposition = 2 * 20.0 * n * n
        # predictions of one fold after the other, held-out ones that are kept, responses of each fold and of all
        numbers = 2.0 * self.n_images * self.n_choices + 4.0 * self.n_train + sum(self.n_fit)
        predictions = 4.0 * numbers * block
        rotated = 4.0 * self.n_finalists * len(self.n_fit) * n * block
        errors = 2 * 16.0 * MAX_NUMBERS_AT_ONCE
        blocks = 6.0 * min(4 * self.n_images * self.n_features, BLOCK_BYTES)  # read, centred, scaled, blurred
        # of two surfaces in files, where they are large; and those of a block twice, while its parts are joined
        weights = 2 * min(self.saved_bytes(n_vertices), _WEIGHTS_IN_MEMORY) + 2 * self.saved_bytes(block)
        total = prepared + self.axes_bytes + decomposition + predictions + rotated + errors + blocks + weights
        return 1.1 * (total + self.held_bytes)  # a tenth more for memory that the allocator cannot reuse
