"""Input that looks odd and is right."""

import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from featcache.dataset.images import load_image
from featcache.dataset.importing.config import ImportConfig
from featcache.dataset.importing.run import import_files
from support.commands import run
from support.lab import N_IMAGES, N_TEST, N_VERTICES, Lab, import_one

N = N_IMAGES + N_TEST
RESPONSES = np.random.default_rng(0).normal(size=(N, N_VERTICES)).astype(np.float32)
WHOLE = np.random.default_rng(1).integers(-2000, 2000, (N, N_VERTICES))  # exact in every dtype below


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Photos are looked at once for all tests."""
    return tmp_path_factory.mktemp("work")


def npy(path: Path, values: np.ndarray) -> str:
    np.save(path, values)
    return str(path)


@pytest.mark.parametrize("dtype", [">f4", ">f8", "<f8", "f2", "i2", ">i4", "i8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_size_byte_order_and_memory_order_of_numbers(dtype, order, lab, work, tmp_path):
    values = np.array(WHOLE, dtype=dtype, order=order)
    subject = import_one(work, images=str(lab.photos), responses=(npy(tmp_path / "r.npy", values),))
    np.testing.assert_array_equal(subject.responses("all"), WHOLE.astype(np.float32))


def test_bytes_of_unsigned_and_of_true_and_false(lab, work, tmp_path):
    for values in (WHOLE.astype(np.uint8), WHOLE > 0):
        subject = import_one(work, images=str(lab.photos), responses=(npy(tmp_path / "r.npy", values),))
        np.testing.assert_array_equal(subject.responses("all"), values.astype(np.float32))


def write_hdf5(path: Path) -> str:
    with h5py.File(path, "w") as file:
        file.create_dataset("glm/betas", data=RESPONSES, chunks=(4, 5), compression="gzip")
        file["note"] = "text"
    return str(path)


def write_npz(path: Path) -> str:
    np.savez_compressed(path, betas=RESPONSES, who=np.array("me"))
    return str(path)


def write_csv(path: Path) -> str:
    lines = ["\ufeffv0;" + ";".join(f"v{n}" for n in range(1, N_VERTICES))]
    lines += [";".join(map(repr, row)) for row in RESPONSES.astype(float).tolist()]
    path.write_text("\r\n".join(lines), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("name", "write"), [("f.h5", write_hdf5), ("f: 1=2.h5", write_hdf5), ("f.npz", write_npz), ("f.csv", write_csv)]
)
def test_files_with_one_array_of_numbers_need_no_name(name, write, lab, work, tmp_path):
    subject = import_one(work, images=str(lab.photos), responses=(write(tmp_path / name),))
    np.testing.assert_array_equal(subject.responses("all"), RESPONSES)


def test_names_with_spaces_signs_and_other_letters(lab, work, tmp_path):
    folder = tmp_path / 'Übung: été = 夏, "1"; x'
    shutil.copytree(lab.photos, folder / "bilder & 写真")
    subject = import_one(
        work,
        images=str(folder / "bilder & 写真"),
        responses=(f"aire V4 (é)={npy(folder / 'réponses 1.npy', RESPONSES)}",),
        roi=(npy(folder / "V4 dorsal, é.npy", np.arange(N_VERTICES) < 2),),
        subject="Müller 3",
    )
    assert subject.name == "Müller 3" and subject.surfaces == ("aire V4 (é)",)
    assert list(subject.rois["aire V4 (é)"]) == ["V4 dorsal, é"]
    assert all(source.is_file() for source in subject.train.sources)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_tables_of_spreadsheets(separator, lab, work, tmp_path):
    rows = [
        ["image", "my id", "Run"],
        *([name, f"pic {n}", "1" if n < 20 else "2"] for n, name in enumerate(lab.names)),
    ]
    text = "\ufeff" + "\r\n".join(separator.join(row) for row in rows) + "\r\n\r\n"
    (tmp_path / "trials.csv").write_text(text, encoding="utf-8")
    subject = import_one(
        work,
        table=tmp_path / "trials.csv",
        images=str(lab.photos),
        id_column="my id",
        session_column="Run",
        responses=(npy(tmp_path / "r.npy", RESPONSES),),
    )
    assert len(subject.train) == N and subject.columns["session"] == ("1",) * 20 + ("2",) * 10


def save_odd(folder: Path) -> dict[str, np.ndarray]:
    """Photos of odd kinds, and what each looks like, about, as 8-bit RGB."""
    folder.mkdir()
    rng = np.random.default_rng(2)
    plain = np.asarray(
        Image.fromarray(rng.integers(30, 220, (3, 4, 3)).astype(np.uint8)).resize((24, 16), Image.Resampling.BICUBIC)
    )
    image, grey = Image.fromarray(plain), np.asarray(Image.fromarray(plain).convert("L"))
    upside = Image.Exif()
    upside[0x0112] = 6  # the camera was held on its side
    image.save(folder / "a.jpg", quality=95, exif=upside)
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "b.png")
    image.convert("CMYK").save(folder / "c.jpg", quality=95)
    image.transpose(Image.Transpose.FLIP_TOP_BOTTOM).quantize(200).save(folder / "d.png")
    frames = [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), Image.new("RGB", image.size)]
    frames[0].save(folder / "e.gif", save_all=True, append_images=frames[1:])
    image.transpose(Image.Transpose.ROTATE_180).save(folder / "F.BMP")
    clear = image.resize((12, 16)).convert("RGBA")
    clear.putalpha(0)
    clear.save(folder / "g.webp", lossless=True)
    return {
        "a.jpg": np.rot90(plain, -1),
        "b.png": np.repeat(grey[..., None], 3, 2),
        "c.jpg": plain,
        "d.png": plain[::-1],
        "e.gif": plain[:, ::-1],
        "F.BMP": plain[::-1, ::-1],
        "g.webp": np.full((16, 12, 3), 128),
    }


def test_photos_of_every_kind(work, tmp_path):
    expected = save_odd(tmp_path / "odd")
    responses = npy(tmp_path / "r.npy", RESPONSES[: len(expected)])
    subject = import_one(work, images=str(tmp_path / "odd"), responses=(responses,))
    assert len(set(subject.train.ids.tolist())) == len(expected)
    assert [source.name for source in subject.train.sources] == sorted(expected)
    for source in subject.train.sources:
        decoded = np.asarray(load_image(source), dtype=float)
        assert decoded.shape == expected[source.name].shape, source.name
        assert np.abs(decoded - expected[source.name]).mean() < 12, source.name


def test_other_and_hidden_files_are_left_out_and_said(lab, work, tmp_path, capfd):
    shutil.copytree(lab.photos, tmp_path / "photos")
    for name in (".DS_Store", "._photo 00é.png", "betas.h5", "manual.pdf"):
        (tmp_path / "photos" / name).write_bytes(b"x")
    (tmp_path / "photos/sub.png").mkdir()
    os.mkfifo(tmp_path / "photos/pipe.png")
    arguments = ("--images", str(tmp_path / "photos"), "--responses", npy(tmp_path / "r.npy", RESPONSES))
    done = run(capfd, "import", *arguments, "--work", str(work))
    assert done["images"] == N
    (note,) = [note for note in done["notes"] if "left out" in note]
    assert all(name in note for name in ("betas.h5", "manual.pdf", "pipe.png")) and "DS_Store" not in note


def test_paths_may_be_relative_and_links(lab, work, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photos").symlink_to(lab.photos)
    npy(Path("r.npy"), RESPONSES)
    subject = import_one(work, images="photos", responses=("r.npy",))
    monkeypatch.chdir("/")
    assert all(source.is_absolute() and source.is_file() for source in subject.train.sources)


def test_one_image_may_be_shown_in_all_sessions_and_one_vertex_is_enough(lab, work, tmp_path):
    here = Lab(tmp_path, lab.signal)
    shown = [lab.names[0], lab.names[1], lab.names[0], lab.names[2]] * 2
    files = tuple(npy(tmp_path / f"{n}.npy", RESPONSES[4 * n : 4 * n + 4, :1]) for n in range(2))
    subject = import_one(work, images=str(lab.photos), table=here.table("t.csv", image=shown), responses=files)
    z = np.concatenate([(part - part.mean()) / part.std() for part in (RESPONSES[:4, :1], RESPONSES[4:8, :1])])
    slow = [z[[row for row, name in enumerate(shown) if name == one]].mean() for one in lab.names[:3]]
    np.testing.assert_allclose(subject.responses("all")[:, 0], slow, atol=1e-6)


def test_notes_are_said_again_where_nothing_is_new(lab, tmp_path):
    shutil.copytree(lab.photos, tmp_path / "photos")
    (tmp_path / "photos/readme.txt").write_text("x")
    config = ImportConfig(images=str(tmp_path / "photos"), responses=(npy(tmp_path / "r.npy", RESPONSES),))
    first, second = (import_files(config, tmp_path / "work", workers=1) for _ in range(2))
    assert not second.new and first.notes == second.notes and any("readme.txt" in note for note in first.notes)
