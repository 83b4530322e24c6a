"""Pictures that look alike have one group: planted looks, and near copies of pictures."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from featcache.dataset.looks import cluster, cluster_images, describe, firsts_of, n_clusters, n_numbers
from featcache.dataset.subject import Images
from featcache.workdir import Workdir
from support.shown import subject_of

SIDE = 96


def picture(seed: int, look: int | None = None) -> Image.Image:
    """A picture of patches and stripes; those of one look have its colours and stripes, and noise of their own."""
    rng = np.random.default_rng(seed)
    of_look = rng if look is None else np.random.default_rng([99, look])
    patches = of_look.uniform(0, 255, (4, 4, 3))
    angle, place = of_look.uniform(0, np.pi), np.indices((SIDE, SIDE))
    stripes = 40 * np.sin((np.cos(angle) * place[0] + np.sin(angle) * place[1]) / 8)
    pixels = np.kron(patches, np.ones((SIDE // 4, SIDE // 4, 1))) + stripes[..., None]
    if look is not None:
        pixels = pixels + np.kron(rng.normal(0, 12, (4, 4, 3)), np.ones((SIDE // 4, SIDE // 4, 1)))
    return Image.fromarray((pixels + rng.normal(0, 3, pixels.shape)).clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, quality: int = 80) -> Image.Image:
    """The picture as a JPEG gives it back."""
    file = io.BytesIO()
    image.save(file, "jpeg", quality=quality)
    return Image.open(file)


def described(pictures) -> np.ndarray:
    return np.stack([describe(one) for one in pictures])


def test_copies_of_copies_are_one_image():
    pairs = np.array([[0, 3], [1, 3], [4, 6]])
    assert firsts_of(pairs, 7).tolist() == [0, 0, 2, 0, 4, 5, 4]
    assert firsts_of(np.empty((0, 2), dtype=np.int64), 3).tolist() == [0, 1, 2]


def test_what_is_described_are_colours_and_edges():
    """Grey levels far apart are far apart; the same colours with other directions of stripes are, too."""
    black, white = (describe(Image.new("RGB", (30, 20), colour)) for colour in ("black", "white"))
    assert np.linalg.norm(white - black) == pytest.approx(1, abs=1e-6)
    place = np.indices((64, 64))
    stripes = [Image.fromarray((127 + 100 * np.sin(place[axis])).astype(np.uint8)) for axis in (0, 1)]
    one, other = described(stripes)
    edges = one[3 * 64 :].reshape(64, 4).sum(0), other[3 * 64 :].reshape(64, 4).sum(0)
    assert edges[0].argmax() != edges[1].argmax() and np.linalg.norm(one - other) > 0.18


def test_planted_looks_are_clusters_and_their_copies_are_with_them():
    """As many looks as clusters: pictures of one look are of one cluster, those of others are not."""
    looks = np.repeat(np.arange(10), 9)
    pictures = [picture(seed, look) for seed, look in enumerate(looks.tolist())]
    pictures += [jpeg(one, 70) for one in pictures[::5]]
    looks = np.concatenate([looks, looks[::5]])
    copies = np.stack([np.arange(0, 90, 5), np.arange(90, 108)], 1)
    found = cluster(described(pictures), copies)
    assert len(np.unique(found)) == 10 == len(np.unique(np.stack([looks, found]), axis=1).T)
    assert found[0] == 0 and np.array_equal(
        np.unique(found, return_index=True)[1], np.sort(np.unique(found, return_index=True)[1])
    )


def test_near_copies_stay_together_where_clusters_cut_through_a_cloud():
    rng = np.random.default_rng(0)
    cloud = rng.uniform(0, 1, (120, n_numbers())).astype(np.float32)
    both = np.concatenate([cloud, rng.permutation(cloud)])  # copies that look otherwise, such as with a blurred part
    copies = np.stack([np.arange(120), np.arange(120, 240)], 1)
    found = cluster(both, copies)
    assert np.array_equal(found[:120], found[120:]) and len(np.unique(found)) == n_clusters(120)
    assert np.array_equal(cluster(both, copies), found)


def test_number_of_clusters_grows_with_the_root_of_the_images():
    assert [n_clusters(n) for n in (1, 5, 10, 99, 900, 73_000)] == [1, 5, 10, 10, 30, 270]


@pytest.fixture
def subjects(tmp_path):
    """Two subjects that share pictures; the second saw them in another order, as other files."""
    pictures = {i: picture(i, i % 10) for i in range(60)}
    return [
        subject_of("subj01", {i: pictures[i] for i in range(40)}, tmp_path / "a", n_test=5),
        subject_of("subj02", {i: pictures[i] for i in reversed(range(20, 60))}, tmp_path / "b"),
    ]


def test_images_of_all_subjects_are_grouped_once_and_remembered(subjects, tmp_path, monkeypatch):
    work = tmp_path / "work"
    groups = cluster_images(subjects, work)
    trained = {int(i) for one in subjects for i in one.train.ids}
    assert groups.keys() == trained and 35 not in subjects[0].train.ids  # a test image that another is trained on
    for look in range(10):
        assert len({groups[i] for i in trained if i % 10 == look}) == 1
    (kept,) = Workdir(work).splits.iterdir()
    monkeypatch.setattr("featcache.dataset.looks.load_image", lambda *_: pytest.fail("decoded again"))
    assert cluster_images(subjects, work) == groups == cluster_images(subjects[::-1], work)
    monkeypatch.undo()
    kept.write_text(kept.read_text().replace("cluster 0", "cluster 7"))  # damaged: made again, the same
    assert cluster_images(subjects, work) == groups and json.loads(kept.read_text())["name"] == "cluster"


def test_other_images_are_grouped_anew(subjects, tmp_path):
    work = tmp_path / "work"
    groups = cluster_images(subjects, work)
    fewer = [one for one in subjects if one.name == "subj01"]
    assert cluster_images(fewer, work).keys() == set(fewer[0].train.ids.tolist()) < groups.keys()
    picture(7, 3).save(subjects[0].train.sources[0])
    again = cluster_images(subjects, work)
    assert again != groups and again[0] == again[3]
    assert isinstance(subjects[0].train, Images)
