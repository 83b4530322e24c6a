"""Values are drawn at the vertices they are of, on a mesh that needs no network."""

import socket
from dataclasses import replace

import numpy as np
import pytest

from featcache.dataset.rois import FSAVERAGE5_VERTICES
from heads.page.surface import (
    colours_of,
    drawn,
    is_scattered,
    load_mesh,
    on_fsaverage,
    on_mesh,
    seen_points,
    spread_out,
    viewer_library,
    viewer_mesh,
)


def test_the_mesh_is_whole_and_comes_without_a_network(monkeypatch):
    def refused(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refused)
    load_mesh.cache_clear()
    mesh = load_mesh()
    n = 2 * FSAVERAGE5_VERTICES
    assert mesh.inflated.shape == (n, 3) and mesh.flat.shape == (n, 2) and mesh.sulci.shape == (n,)
    assert len(mesh.faces) == 2 * 20_480 and set(np.unique(mesh.faces)) == set(range(n))
    left, right = mesh.inflated[:FSAVERAGE5_VERTICES], mesh.inflated[FSAVERAGE5_VERTICES:]
    assert left[:, 0].max() < 0 < right[:, 0].min()


def test_a_value_is_at_its_fsaverage_vertex(reported):
    subject = reported.dataset.subjects[0]
    n = sum(subject.n_vertices.values())
    mapped = on_mesh(subject, np.arange(n, dtype=float)).reshape(2, -1)
    for number, hemisphere in enumerate(("lh", "rh")):
        places = np.flatnonzero(subject.fsaverage[hemisphere])
        assert (places < FSAVERAGE5_VERTICES).all()  # so the simulated trees are drawn whole
        first = 0 if number == 0 else subject.n_vertices["lh"]
        np.testing.assert_array_equal(mapped[number, places], first + np.arange(len(places)))
        assert np.isnan(np.delete(mapped[number], places)).all()


def test_of_full_size_data_every_vertex_of_the_coarser_mesh_is_drawn(reported):
    subject = reported.dataset.subjects[0]
    mask = np.zeros(163_842, dtype=bool)
    mask[[3, 10_241, 10_242, 160_000]] = True
    subject = replace(subject, n_vertices={"lh": 4, "rh": 4}, fsaverage={"lh": mask, "rh": mask})
    mapped = on_mesh(subject, np.arange(8.0))
    assert {int(p): mapped[p] for p in np.flatnonzero(~np.isnan(mapped))} == {3: 0, 10_241: 1, 10_245: 4, 20_483: 5}


def test_other_surfaces_have_no_place(reported):
    subject = reported.dataset.subjects[0]
    assert on_fsaverage(subject)
    assert not on_fsaverage(replace(subject, fsaverage={"lh": subject.fsaverage["lh"], "rh": None}))
    assert not on_fsaverage(replace(subject, n_vertices={"V4": 3}, fsaverage={"V4": None}))
    fine_alone = np.arange(163_842) >= FSAVERAGE5_VERTICES
    assert not on_fsaverage(replace(subject, fsaverage={"lh": fine_alone, "rh": fine_alone}))


def test_scattered_values_spread_and_dense_ones_stay():
    mesh = load_mesh()
    alone = np.full(2 * FSAVERAGE5_VERTICES, np.nan)
    alone[5000] = 7
    assert is_scattered(alone, mesh)
    spread = spread_out(alone, mesh)
    near = {5000}
    for _ in range(2):
        near |= {int(p) for face in mesh.faces for p in face if near & set(face.tolist())}
    assert set(np.flatnonzero(spread == 7)) == near and np.isnan(np.delete(spread, list(near))).all()
    assert np.isnan(np.delete(alone, 5000)).all()
    patch = np.where(mesh.inflated[:, 1] < -40, 1.0, np.nan)
    assert not is_scattered(patch, mesh)


def test_colours_are_of_the_palette_and_grey_where_there_is_no_value():
    mesh = load_mesh()
    values = np.full(2 * FSAVERAGE5_VERTICES, np.nan)
    values[:4] = [0, 0.5, 1, 99]
    palette = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=float)
    colours = colours_of(values, palette, 0, 1, mesh)
    assert colours[:4].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255], [0, 0, 255]]
    assert (np.ptp(colours[4:], axis=1) == 0).all()


def test_a_picture_shows_each_view_in_the_colours_of_its_points():
    points, mesh = seen_points(), load_mesh()
    shown = points[points >= 0]
    assert 0.2 < (points >= 0).mean() < 0.9 and shown.max() < 2 * FSAVERAGE5_VERTICES
    seen = np.zeros(2 * FSAVERAGE5_VERTICES, dtype=bool)
    seen[shown] = True
    flat = np.unique(mesh.flat_faces[:, 0])
    assert seen[flat].mean() > 0.85  # the flat map is whole, though some faces are smaller than a pixel
    left = shown < FSAVERAGE5_VERTICES
    assert 0.4 < left.mean() < 0.6
    colours = np.zeros((2 * FSAVERAGE5_VERTICES, 3), np.uint8)
    colours[:FSAVERAGE5_VERTICES, 0], colours[FSAVERAGE5_VERTICES:, 2] = 255, 255
    picture = np.asarray(drawn(colours, 520))
    assert picture.shape[1] == 520 and picture[0, 0, 3] == 0
    solid = picture[..., 3] == 255
    rows = [np.flatnonzero((picture[..., channel] == 255) & solid) % 520 for channel in (0, 2)]
    assert abs(rows[0].mean() - rows[1].mean()) > 20  # left of it in every view


def test_the_viewer_is_in_the_wheel_and_takes_the_mesh():
    assert b"niivue" in viewer_library()
    parts = viewer_mesh(load_mesh())
    assert {name: len(part) for name, part in parts.items()} == {
        "points": 20_484 * 12,
        "faces": 40_960 * 12,
        "grey": 20_484,
    }


@pytest.mark.parametrize("view", ["flat", "inflated"])
def test_left_is_on_the_left(view):
    points = getattr(load_mesh(), view)
    assert points[:FSAVERAGE5_VERTICES, 0].mean() < points[FSAVERAGE5_VERTICES:, 0].mean()
