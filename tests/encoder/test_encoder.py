"""An encoder predicts test images as they were predicted, whatever the kind of model; each network runs once."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from featcache.backbone.network import TorchBackbone
from featcache.cache.store import list_stores
from featcache.dataset.algonauts import open_challenge
from featcache.errors import ConfigError, DataError, FeatcacheError
from featcache.workdir import Workdir
from heads.blend.saved import load_blend
from heads.encoder.work import encoder_of_work


@pytest.fixture(scope="module")
def subjects(tiny):
    return open_challenge(tiny).subjects


@pytest.fixture(scope="module")
def encoder(every_kind, subjects):
    return encoder_of_work(subjects, every_kind)


def stores_of(work, subject):
    return [store for store in list_stores(Workdir(work).predictions) if store.key["subject"] == subject.name]


def rounding_of_stretched(path, subject):
    """(n_vertices,) what float32 may lose where a head that hardly varies is stretched to the spread of the others.

    A head is brought there by ``scale * head + shift``. After two epochs some scales are above 10,000, and the two
    terms, which cancel, are rounded to their own size.
    """
    heads, parts = load_file(path), []
    for surface, n in subject.n_vertices.items():
        shifts = [
            shift.abs().numpy() for name, shift in heads.items() if re.fullmatch(rf"fold\d+\.{surface}\.shift", name)
        ]
        parts.append(np.max(shifts, axis=0) if shifts else np.zeros(n))
    return 4 * np.finfo(np.float32).eps * np.concatenate(parts)


def test_every_kind_of_model_predicts_test_images_as_it_did(every_kind, subjects):
    for subject in subjects:
        stores = stores_of(every_kind, subject)
        assert len(stores) == 11, [store.facts["model"] for store in stores]
        for store in stores:
            model = store.facts["model"]
            encoder = encoder_of_work([subject], every_kind, model)
            expected = np.concatenate([store.read(surface, store.n_train) for surface in subject.surfaces], 1)
            # in the batches of the extraction
            found = encoder.predict(list(subject.image_sources), model=model)[store.n_train :]
            apart = np.abs(found - expected) - 1e-5 * np.abs(expected)
            assert (
                apart <= 1e-6 + rounding_of_stretched(Workdir(every_kind).head_weights(store.name), subject)
            ).all(), model
            # layers, and what a core puts out, are rounded to float16. A batch of another size adds up otherwise,
            # so that a last bit of the network may decide which way
            one = encoder.predict(subject.test.sources[2], model=model, batch_size=1)
            np.testing.assert_allclose(one, expected[2:3], atol=1e-3, rtol=1e-5, err_msg=model)


def test_the_blend_is_the_rows_of_the_submission(every_kind, subjects, encoder):
    blend = load_blend(Workdir(every_kind).saved_blend)
    assert encoder.models()[0] == "blend" and len(encoder.models()) == 12
    for subject in subjects:
        stores = {store.facts["model"]: store for store in stores_of(every_kind, subject)}
        for surface in subject.surfaces:
            n_train = len(subject.train)
            expected = blend[subject.name][surface].apply(surface, stores, n_train, len(subject.image_ids))
            pictures = list(subject.image_sources)
            found = encoder.predict(pictures, subject=subject.name, surface=surface)[n_train:]
            np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)
            folder = Workdir(every_kind).submission / subject.name
            submitted = np.load(folder / f"{surface}_pred_test.npy")
            np.testing.assert_allclose(found.astype(submitted.dtype), submitted, rtol=2e-3, atol=1e-5)


def test_each_network_runs_once_over_each_image(every_kind, subjects, monkeypatch):
    passes = {}
    honest = TorchBackbone.normalise

    def counting(self, pixels):
        key = (self.digest, tuple(self.transform_settings["input_size"]), self.fused)
        passes[key] = passes.get(key, 0) + len(pixels)
        return honest(self, pixels)

    encoder = encoder_of_work(subjects, every_kind)
    encoder.predict_all(subjects[0].test.sources[0])  # loads the networks, which run once more to be optimised
    passes.clear()
    monkeypatch.setattr(TorchBackbone, "normalise", counting)
    found = encoder.predict_all(list(subjects[0].test.sources), batch_size=2)
    # two frozen networks, one for each fold of stage 1, and for each fold and subject of stage 2
    assert len(passes) == 2 + 2 + 4 and set(passes.values()) == {len(subjects[0].test)}
    for subject in subjects:
        alone = encoder.predict(list(subjects[0].test.sources), subject=subject.name, batch_size=2)
        np.testing.assert_allclose(np.concatenate(list(found[subject.name].values()), 1), alone, atol=1e-5)


def test_chunks_and_batches_change_nothing(encoder, subjects, monkeypatch):
    pictures, name = list(subjects[1].image_sources), subjects[1].name
    whole = encoder.predict(pictures, subject=name)
    monkeypatch.setattr("heads.encoder.encoder._LONGEST", 4)
    np.testing.assert_allclose(encoder.predict(pictures, subject=name, batch_size=2), whole, atol=1e-3, rtol=1e-5)


def test_pictures_of_every_kind_are_the_same_picture(encoder, subjects):
    path, name = subjects[0].test.sources[0], subjects[0].name
    image = Image.open(path).convert("RGB")
    pixels = np.asarray(image)
    expected = encoder.predict([path], subject=name)
    kinds = [
        image,
        str(path),
        pixels,
        pixels[None],
        torch.from_numpy(pixels.copy()),
        torch.from_numpy(pixels.copy()).permute(2, 0, 1),
        (pixels / 255).astype(np.float32),
        [image],
        iter([path]),
    ]
    for kind in kinds:
        np.testing.assert_array_equal(encoder.predict(kind, subject=name), expected)
    mixed = encoder.predict([image, str(path), pixels], subject=name)
    np.testing.assert_allclose(mixed, np.repeat(expected, 3, 0), atol=1e-3, rtol=1e-5)


def test_a_folder_is_its_images_in_the_order_of_their_names(encoder, subjects):
    folder, name = subjects[0].test.sources[0].parent, subjects[0].name
    np.testing.assert_array_equal(
        encoder.predict(folder, subject=name), encoder.predict(sorted(folder.iterdir()), subject=name)
    )


def test_an_roi_is_its_columns(encoder, subjects):
    subject = subjects[0]
    whole = encoder.predict(list(subject.test.sources), subject=subject.name)
    vertices = encoder.vertices(subject.name)
    assert vertices.surface.tolist() == [s for s, n in subject.n_vertices.items() for _ in range(n)]
    assert encoder.rois(subject.name)
    for roi in encoder.rois(subject.name):
        mask = np.concatenate([subject.rois[s].get(roi, np.zeros(n, bool)) for s, n in subject.n_vertices.items()])
        found = encoder.predict(list(subject.test.sources), subject=subject.name, roi=roi)
        np.testing.assert_allclose(found, whole[:, mask], rtol=1e-5, atol=1e-5)
        named = encoder.vertices(subject.name, roi=roi)
        assert named.surface.tolist() == vertices.surface[mask].tolist()
        assert named.number.tolist() == vertices.number[mask].tolist()


@pytest.mark.parametrize(
    ("images", "found"),
    [
        ([], "none"),
        (7, "type int"),
        (b"bytes", "type bytes"),
        (np.zeros((4, 4, 5), np.uint8), r"shape \(4, 4, 5\)"),
        (np.full((4, 4, 3), 300.0), "300 to 300"),
        (np.full((4, 4, 3), np.nan), "nan"),
        (np.zeros((4, 4, 3), np.int64), "int64"),
        (np.zeros((0, 4, 4, 3), np.uint8), "none"),
        ("nowhere.png", "no such file"),
        (Image.new("F", (4, 4)), "mode F"),
    ],
)
def test_images_of_no_kind_are_refused(encoder, subjects, images, found):
    with pytest.raises(DataError, match=found) as caught:
        encoder.predict(images, subject=subjects[0].name)
    assert "\n" not in str(caught.value)


def test_names_that_are_not_there_are_refused(encoder, subjects):
    name, picture = subjects[0].name, subjects[0].test.sources[0]
    for wrong in ({"roi": "FFA-9"}, {"surface": "left"}, {"model": "resnet"}):
        with pytest.raises(ConfigError, match="expected one of"):
            encoder.predict(picture, subject=name, **wrong)
    with pytest.raises(ConfigError, match="subject: expected one of subj01, subj02; found none"):
        encoder.predict(picture)
    with pytest.raises(ConfigError, match="batch_size"):
        encoder.predict(picture, subject=name, batch_size=0)


def test_a_model_is_named_by_its_digits_and_never_another_predicts(encoder, subjects):
    name, picture = subjects[0].name, subjects[0].test.sources[0]
    for model in encoder.models()[1:]:
        by_digits = encoder.predict(picture, subject=name, model=model[-6:])
        np.testing.assert_array_equal(by_digits, encoder.predict(picture, subject=name, model=model))
    with pytest.raises(ConfigError, match="which subj01 has not"):
        encoder.predict(picture, subject=name, model="123456")


def test_heads_without_scales_of_an_earlier_version_are_refused(work, subjects):
    from safetensors.torch import load_file, save_file

    store = next(s for s in stores_of(work, subjects[0]) if "spatial" in s.facts["model"])
    path = Workdir(work).head_weights(store.name)
    tensors = {name: values for name, values in load_file(path).items() if not name.endswith((".scale", ".shift"))}
    save_file({n: v.clone() for n, v in tensors.items()}, path, {"predictions": store.name})
    encoder = encoder_of_work(subjects[:1], work, store.facts["model"])
    with pytest.raises(FeatcacheError, match="earlier version"):
        encoder.predict(subjects[0].test.sources[0])
