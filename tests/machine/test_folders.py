"""A folder is replaced whole, whenever its process dies, and whoever reads it meanwhile reads one state of it."""

import itertools
import os
import threading
from pathlib import Path

import pytest

from featcache.errors import StoreError
from featcache.machine import folders
from featcache.machine.folders import (
    link_or_copy,
    read_unchanged,
    renewed_folder,
    replace_folder,
    restore_folder,
    staged_folder,
    whole_folder,
)
from support.dying import dies_before


@pytest.fixture(params=["exchanges", "renames"])
def system(request, monkeypatch):
    """One that can exchange two folders, where this one can, and one that cannot."""
    if request.param == "renames":
        monkeypatch.setattr(folders, "_exchanged", lambda *_: False)


def fill(folder: Path, content: str) -> None:
    folder.mkdir(exist_ok=True)
    for name in ("a", "b"):
        (folder / name).write_text(content)


def content_of(folder: Path) -> str:
    one, other = ((folder / name).read_text() for name in ("a", "b"))
    assert one == other
    return one


@pytest.mark.parametrize("older", [True, False])
def test_a_folder_takes_the_place_of_another(tmp_path, system, older):
    if older:
        fill(tmp_path / "folder", "older")
    fill(tmp_path / "new", "new")
    replace_folder(tmp_path / "new", tmp_path / "folder")
    assert content_of(tmp_path / "folder") == "new" and [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_process_that_dies_at_any_point_leaves_one_folder_whole(tmp_path, system):
    path = tmp_path / "folder"
    for number in itertools.count():
        fill(path, "older")
        fill(tmp_path / "new", "new")
        died = dies_before(number, lambda: replace_folder(tmp_path / "new", path))
        restore_folder(path)
        assert content_of(path) in ("older", "new") and (died or content_of(path) == "new")
        if not died:
            break
    assert number >= 2


def test_an_error_leaves_the_older_folder_and_nothing_else(tmp_path):
    fill(tmp_path / "folder", "older")
    with pytest.raises(ZeroDivisionError), renewed_folder(tmp_path / "folder") as partial:
        fill(partial, "new")
        _ = 1 / 0
    assert content_of(tmp_path / "folder") == "older" and [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_files_that_are_kept_are_in_the_new_folder_too(tmp_path, system):
    fill(tmp_path / "folder", "older")
    (tmp_path / "folder" / "c.npz").write_text("kept")
    with renewed_folder(tmp_path / "folder", keep="*.npz") as partial:
        fill(partial, "new")
    assert content_of(tmp_path / "folder") == "new" and (tmp_path / "folder" / "c.npz").read_text() == "kept"
    assert {path.name for path in tmp_path.iterdir()} == {"folder", ".writing.lock"}


def test_names_of_staged_folders_are_their_own(tmp_path):
    with staged_folder(tmp_path / "folder") as one, staged_folder(tmp_path / "folder") as other:
        assert one != other and one.parent == other.parent == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_copied_where_it_cannot_be_linked(tmp_path, monkeypatch):
    def no_links(*_: object) -> None:
        raise OSError("no links here")

    (tmp_path / "a").write_text("content")
    link_or_copy(tmp_path / "a", tmp_path / "b")
    monkeypatch.setattr(os, "link", no_links)
    link_or_copy(tmp_path / "a", tmp_path / "c")
    assert os.path.samefile(tmp_path / "a", tmp_path / "b") and (tmp_path / "c").read_text() == "content"
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "c"}


def test_a_reader_sees_one_state_of_a_folder_that_is_replaced_again_and_again(tmp_path):
    path, over = tmp_path / "folder", threading.Event()
    fill(path, "0")

    def replace() -> None:
        for number in itertools.takewhile(lambda _: not over.is_set(), itertools.count(1)):
            fill(tmp_path / "new", str(number))
            replace_folder(tmp_path / "new", path)

    writer, seen = threading.Thread(target=replace), set[str]()
    writer.start()
    try:
        while len(seen) < 10:
            seen.add(read_unchanged(path, lambda: content_of(path)))
    finally:
        over.set()
        writer.join()


def test_what_a_reader_raises_of_a_folder_that_stays_is_raised(tmp_path):
    fill(tmp_path / "folder", "0")
    calls = []
    with pytest.raises(ZeroDivisionError):
        read_unchanged(tmp_path / "folder", lambda: calls.append(1) or 1 / 0)
    assert calls == [1]


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_appears_once_it_is_filled(tmp_path, exists):
    path = tmp_path / "folder"
    if exists:
        path.mkdir()
    with whole_folder(path) as partial:
        (partial / "a").write_text("content")
        assert not (path / "a").exists()
    assert (path / "a").read_text() == "content" and list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_no_folder(tmp_path):
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "folder") as partial:
        (partial / "a").write_text("content")
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_another_process_filled_meanwhile_stays_as_it_is(tmp_path):
    with (
        pytest.raises(StoreError, match="found what another process has put there"),
        whole_folder(tmp_path / "a") as new,
    ):
        (new / "content").write_text("second")
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "content").write_text("first")
    assert (tmp_path / "a" / "content").read_text() == "first" and len(list(tmp_path.iterdir())) == 1
