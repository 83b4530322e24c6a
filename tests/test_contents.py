import os

import pytest

from featcache.contents import ContentIndex


def test_digest_follows_content_and_order_but_not_names_or_dates(tmp_path):
    a, b, c = (tmp_path / name for name in "abc")
    a.write_bytes(b"one"), b.write_bytes(b"two"), c.write_bytes(b"one")
    digest = ContentIndex(tmp_path / "index.json").digest
    assert digest([a, b]) == digest([c, b]) != digest([b, a])
    before = digest([a, b])
    os.utime(a, (1, 1))
    assert digest([a, b]) == before
    a.write_bytes(b"One")
    assert digest([a, b]) != before


def test_digest_reads_a_file_once(tmp_path, monkeypatch):
    file = tmp_path / "a"
    file.write_bytes(b"one")
    first = ContentIndex(tmp_path / "index.json").digest([file])
    monkeypatch.setattr("featcache.contents._file_digest", lambda path: pytest.fail("the file was read again"))
    assert ContentIndex(tmp_path / "index.json").digest([file]) == first


def test_a_broken_index_costs_a_reading_and_changes_nothing(tmp_path):
    file, index = tmp_path / "a", tmp_path / "index.json"
    file.write_bytes(b"one")
    first = ContentIndex(index).digest([file])
    index.write_text("{")
    assert ContentIndex(index).digest([file]) == first
