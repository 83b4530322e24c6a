"""A small network on cached layers that all subjects share, and closed-form heads on what it puts out.

For each held-out fold, several members of the network are trained from different first weights, with a readout of every
subject's vertices. Then the readouts are dropped: heads are fitted in closed form to the outputs of all members, as
they are to the layers of a backbone that was trained on these images. So penalties and windows are chosen on the
held-out fold, part by part (see held_out.py).

Source: Cowley, Stan, Pillow and Smith, Compact deep neural network models of visual cortex (2023).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch

from featcache.machine.device import resolve_dtype
from featcache.machine.device_memory import spare_on
from featcache.machine.progress import bar
from heads.config import FitConfig, RidgeConfig
from heads.features.rows import LayerRows
from heads.modules.core import CORE, Core, CoreHeads
from heads.solvers.base import Block, Fits, Problem, Solver
from heads.solvers.gradient import Task
from heads.solvers.held_out import FoldPlan, Split
from heads.solvers.joint import JointHeads, JointTraining, Statistics, TraineeRows, build_joint
from heads.solvers.layers.priors import prior_set
from heads.solvers.layers.ridge import PENALTIES, LayeredRidge, scaled_kernels
from heads.solvers.layers.sizes import VERTEX_BLOCK, counted
from heads.solvers.memory import CACHE_SHARE, STACK_SHARE
from heads.solvers.trained import predict

_NEXT_MEMBER = 1_000_003  # between the seeds of two members, so that no usual --fold-seed gives another's


def build(problem: Problem) -> Solver:
    """Build the solver of one subject; all subjects share one training. Raises ConfigError for small folds."""
    return build_joint(problem, CoreTraining)


class CoreTraining(JointTraining):
    """Trains the members of every fold, and hands out their outputs."""

    def __init__(self, trainees: Sequence[TraineeRows], config: FitConfig, device: str) -> None:
        super().__init__(trainees, config, device)
        self._members: dict[int, list[_Heads]] = {}
        self._tested = np.concatenate([trainee.subject.test.ids for trainee in trainees])

    def solver(self, number: int) -> "CoreSolver":
        return CoreSolver(self, number)

    def split(self, number: int, k: int) -> Split:
        """Rows to train on; nothing is chosen, so the network of the last epoch is kept.

        A picture that any subject is tested on is left out.
        """
        plan = self.plans[number]
        outside = plan.outside(k)
        parts = as_trained(plan).parts(k)
        return Split(outside[~np.isin(plan.image_ids[outside], self._tested)], [], parts)

    def make(self, tasks: Sequence[Task], statistics: Statistics, k: int) -> "_Heads":
        heads = _Heads(self.trainees[0].fold_rows(k).shapes, self.subjects, self.config.core).to(self.device)
        heads.standardise.fix(statistics)
        heads.standardise.in_bfloat16 = resolve_dtype("auto", self.device) == "bfloat16"  # half the time where it is
        return heads

    def members(self, k: int) -> "list[_Heads]":
        """The members of one fold, trained at first use."""
        if k not in self._members:
            seeds = [self.config.seed + _NEXT_MEMBER * member for member in range(self.config.core.members)]
            label = f"fold {self.plans[0].held_out[k]} core"
            with bar(label, len(seeds), "members") as advance:
                self._members[k] = [self._member(k, seed, advance) for seed in seeds]
        return self._members[k]

    def _member(self, k: int, seed: int, advance: Callable[[int], None]) -> "_Heads":
        (heads,) = self.train(k, seed)
        advance(1)
        assert isinstance(heads, _Heads)
        return heads.eval()

    def outputs(self, number: int, k: int) -> LayerRows:
        """What the members of one fold put out for one subject's images: one array of all their channels."""
        rows = self.trainees[number].fold_rows(k)
        cores = [heads.standardise for heads in self.members(k)]
        (outputs,) = predict([lambda inputs: torch.cat([core(inputs)[CORE].half() for core in cores], -1)], rows)
        return LayerRows.of_arrays({CORE: outputs.cpu().numpy()}, rows.device)


class CoreSolver:
    """Heads of one subject, in closed form on the outputs of the core of every fold."""

    vertex_block: int | None = VERTEX_BLOCK

    def __init__(self, training: CoreTraining, number: int) -> None:
        self._training, self._number = training, number
        self._trainee = training.trainees[number]

    @cached_property
    def _plan(self) -> FoldPlan:
        return as_trained(self._trainee.plan)

    @cached_property
    def _ridge(self) -> LayeredRidge:
        free = spare_on(self._training.device, self._training.config.max_memory)
        outputs = [self._training.outputs(self._number, k) for k in range(len(self._plan))]
        kernels = scaled_kernels(outputs, self._plan, free * STACK_SHARE)
        priors = prior_set(outputs[0].grids, (None,), self._plan.n_train)
        return LayeredRidge(
            kernels, self._plan, RidgeConfig(penalties=PENALTIES), priors, cache_bytes=free * CACHE_SHARE
        )

    def memory(self, n_vertices: int) -> float:
        """Bytes of the closed form, from counts alone: they are asked for before the core is trained."""
        plan, rows, config = self._plan, self._trainee.rows[0], self._training.config
        height, width, n_channels = Core.shape(rows.shapes, config.core)
        grids, n_features = {CORE: (height, width)}, height * width * n_channels * config.core.members
        counts = counted(
            grids,
            spare_on(self._training.device, config.max_memory),
            n_train=plan.n_train,
            n_images=len(rows),
            n_fit=tuple(len(plan.outside(k)) for k in range(len(plan))),
            n_choices=max(map(plan.n_choices, range(len(plan)))),
            n_scales=len(plan),
            n_features=n_features,
            n_priors=len(prior_set(grids, (None,), plan.n_train)),
            backbone_trained=True,
            held_bytes=2.0 * len(rows) * n_features * len(plan),  # outputs of every fold, as float16
        )
        return counts.memory(n_vertices)

    def fit(self, block: Block) -> Fits:
        fits = self._ridge.fit(block)
        shared = {
            (prefix, f"{CORE}{number}.{name}"): tensor.clone()  # a file of tensors holds no tensor twice
            for k, prefix in enumerate(self._plan.prefixes)
            for number, member in enumerate(self._training.members(k))
            for name, tensor in member.standardise.state_dict().items()
        }
        return fits._replace(shared=shared)


def as_trained(plan: FoldPlan) -> FoldPlan:
    """The plan of features that were trained on all images outside a fold, as the outputs of its core are."""
    return replace(plan, backbone_trained=True)


class _Heads(CoreHeads, JointHeads):
    """A core with readouts as the gradient loop calls them."""
