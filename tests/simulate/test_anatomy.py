"""Vertices, receptive fields and ROIs lie where the anatomy says, subject by subject."""

from dataclasses import replace

import numpy as np

from featcache.dataset.rois import CLASSES, HEMISPHERES
from featcache.simulate.anatomy import mapping, roi_labels
from support.simulated import TINY, VERTEX_ARRAYS, load_mask, load_truth


def test_subjects_six_and_eight_lack_vertices_of_the_common_set(tree):
    for hemisphere in HEMISPHERES:
        masks = [load_mask(tree, f"subj{s:02d}", f"{hemisphere}.all-vertices_fsaverage_space") for s in TINY.subjects]
        for subject, mask in zip(TINY.subjects, masks, strict=True):
            lacking = int((masks[0] & ~mask & 1).sum())
            assert lacking == TINY.n_deleted(subject, hemisphere) == int(masks[0].sum()) - int(mask.sum())
            assert (lacking > 0) == (subject in (6, 8))


def test_a_vertex_is_the_same_in_all_subjects_through_the_masks(tree):
    first, other = load_truth(tree, "subj01", "rh"), load_truth(tree, "subj06", "rh")
    mask = load_mask(tree, "subj06", "rh.all-vertices_fsaverage_space")
    np.testing.assert_array_equal(np.flatnonzero(mask), other["index"])
    columns = np.searchsorted(first["index"], other["index"])
    for name in VERTEX_ARRAYS:
        np.testing.assert_array_equal(first[name][columns], other[name])
    together = np.corrcoef(first["weights"][columns].ravel(), other["weights"].ravel())[0, 1]
    assert 0.5 < together < 0.99
    # Padding at the end instead of aligning puts most columns beside another vertex.
    assert (first["field_x"][: len(other["index"])] != other["field_x"]).mean() > 0.3


def test_every_subject_lacks_a_rare_roi_in_both_hemispheres():
    position = (np.arange(2_000) + 0.5) / 2_000
    for subject, seed in ((subject, seed) for subject in range(1, 9) for seed in range(5)):
        both = [roi_labels(replace(TINY, seed=seed), subject, hemisphere, position) for hemisphere in HEMISPHERES]
        empty = [
            {
                name
                for roi_class in CLASSES
                for label, name in mapping(roi_class).items()
                if not (labels[roi_class] == label).any()
            }
            for labels in both
        ]
        assert empty[0] & empty[1] & {"aTL-faces", "mTL-bodies", "mTL-faces", "mTL-words"}
        assert not (empty[0] | empty[1]) & {"V1v", "hV4", "FFA-1", "PPA", "early", "parietal"}


def test_rois_overlap_between_classes_and_differ_between_subjects(tree):
    streams = load_mask(tree, "subj01", "lh.streams_challenge_space") > 0
    visual = load_mask(tree, "subj01", "lh.prf-visualrois_challenge_space")
    assert (streams & (visual > 0)).sum() > 10
    assert not streams.all()
    others = [load_mask(tree, f"subj{s:02d}", "lh.prf-visualrois_challenge_space") for s in (2, 3, 4)]
    assert any((other != visual).any() for other in others)
    assert all((other != visual).mean() < 0.2 for other in others)


def test_left_hemispheres_look_right_and_ventral_areas_up(tree):
    for hemisphere, side in (("lh", 1), ("rh", -1)):
        truth = load_truth(tree, "subj01", hemisphere)
        early = truth["level"] == "early"
        assert (side * (truth["field_x"][early] - 0.5) >= 0).all()
        assert (truth["field_y"][truth["area"] == "V1v"] <= 0.5).all()
        assert (truth["field_y"][truth["area"] == "V1d"] >= 0.5).all()


def test_fields_grow_from_early_to_late(tree):
    truth = load_truth(tree, "subj01", "lh")
    sizes = [np.mean(truth["field_size"][truth["area"] == area]) for area in ("V1v", "V2v", "V3v", "hV4", "ventral")]
    assert sizes == sorted(sizes) and sizes[-1] > 5 * sizes[0]
