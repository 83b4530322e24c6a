"""What is to be imported of one subject: pictures, trials, and what was recorded in them; nothing is averaged yet."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from featcache.dataset.subject import ImageSource
from featcache.formats.lazy import Array
from featcache.formats.volumes import Grid


@dataclass(frozen=True, eq=False)
class Stimuli:
    """Pictures that were shown.

    sources : (n_stimuli,)
    ids : (n_stimuli,) int64; None: to be made from the pixels
    test : (n_stimuli,) bool, whether it is to be predicted and not fitted to
    columns : {name: (n_stimuli,) texts}
    """

    sources: tuple[ImageSource, ...]
    ids: np.ndarray | None
    test: np.ndarray
    columns: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Recording:
    """One surface.

    trials : (n_trials, n_vertices) responses, which stay on the disk
    rois : {name: (n_vertices,) bool}
    noise_ceiling : (n_vertices,) fraction of variance of averaged responses; None where not given
    ncsnr : (n_vertices,) noise-ceiling signal-to-noise ratio; None where not given
    positions : (n_vertices, 3) mm; None where not known
    grid : of voxels that the positions are of; None where not known
    fsaverage : (163842,) bool, true at the fsaverage vertices that the columns stand for, in rising order; None where
        they stand for none
    """

    trials: Array | np.ndarray
    rois: Mapping[str, np.ndarray] = field(default_factory=dict)
    noise_ceiling: np.ndarray | None = None
    ncsnr: np.ndarray | None = None
    positions: np.ndarray | None = None
    fsaverage: np.ndarray | None = None
    grid: Grid | None = None


@dataclass(frozen=True, eq=False)
class Material:
    """One subject, as its files have it.

    shown : (n_trials,) number of the stimulus of each trial
    session : (n_trials,) number of the session of each trial, from 0; None where not known
    recordings : {surface: what was recorded}; all have the same trials
    test_trials : trials that each row of responses to test images is the mean of; None where not known
    notes : sentences for the user, such as on files that were left out
    session_names : what each session is called, for messages; () where they have no names
    """

    name: str
    stimuli: Stimuli
    shown: np.ndarray
    session: np.ndarray | None
    recordings: Mapping[str, Recording]
    notes: Sequence[str] = ()
    test_trials: int | None = None
    session_names: Sequence[str] = ()
