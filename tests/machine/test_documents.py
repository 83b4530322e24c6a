import json
import os
import random
from contextlib import suppress

import msgspec
import pytest

from featcache.backbone.keys import BackboneKey
from featcache.machine.documents import (
    DocumentError,
    of_its_types,
    parse_json,
    read_document,
    read_json,
    write_document,
)

CONTENT = {"rows": {"pooled": 40, "ü": 3}, "key": "0123", "values": [1.5, None, True, -(2**63), float("nan")]}


def test_what_was_written_is_read(tmp_path):
    write_document(tmp_path / "a.json", CONTENT)
    found = read_document(tmp_path / "a.json", dict)
    assert json.dumps(found) == json.dumps(CONTENT)
    assert json.loads((tmp_path / "a.json").read_text()).keys() == {*CONTENT, "digest"}


class Rows(msgspec.Struct, forbid_unknown_fields=True):
    rows: dict[str, int]
    name: str


def test_with_its_schema_no_change_of_a_bit_is_read_as_something_else(tmp_path):
    path = tmp_path / "a.json"
    write_document(path, {"rows": {"pooled": 40, "layer": 3}, "name": "subj01"})
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(DocumentError):
            read_document(path, Rows)


def test_a_document_under_the_name_of_another_is_noticed(tmp_path):
    write_document(tmp_path / "a.json", {"n": 3})
    os.replace(tmp_path / "a.json", tmp_path / "b.json")
    with pytest.raises(DocumentError, match="not what was written"):
        read_document(tmp_path / "b.json", dict)


def test_a_document_of_an_earlier_version_is_read_by_its_types(tmp_path):
    (tmp_path / "a.json").write_text('{"rows": {"pooled": 40}, "name": "n"}')
    assert read_document(tmp_path / "a.json", Rows) == Rows({"pooled": 40}, "n")
    (tmp_path / "a.json").write_text('{"rows": {"pooled": 4.5}, "name": "n"}')
    with pytest.raises(DocumentError, match="another form"):
        read_document(tmp_path / "a.json", Rows)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        b"\xff\xfe",
        "[" * 40_000,
        "[" * 500 + "]" * 500,
        '{"a":' * 70 + "1" + "}" * 70,
        f"[{2**63}]",
        f"[{-(2**63) - 1}]",
        "[" + "9" * 5000 + "]",
    ],
)
def test_json_without_bounds_is_refused(text):
    with pytest.raises(DocumentError):
        parse_json(text)


def test_numbers_of_64_bits_and_digits_in_texts_are_read():
    assert parse_json(f'[{2**63 - 1}, {-(2**63)}, "{"9" * 40}"]') == [2**63 - 1, -(2**63), "9" * 40]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no FIFOs on this system")
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(OSError, match="no regular file"):
        read_json(tmp_path / "a.json")
    with pytest.raises(OSError):
        read_json(tmp_path)


def test_values_of_other_types_than_a_key_declares_are_named():
    key = BackboneKey(name="resnet18", weights="hub", size=224)
    assert of_its_types(key) is key
    with pytest.raises(DocumentError, match="size is of another type"):
        BackboneKey.from_json({"name": "resnet18", "weights": "hub", "size": "224"})


def test_nothing_else_is_raised_by_any_text():
    draw = random.Random(0)
    whole = json.dumps(CONTENT)
    for _ in range(2000):
        text = list(whole)
        for _ in range(draw.randint(1, 6)):
            text[draw.randrange(len(text))] = chr(draw.choice([0, 34, 44, 57, 91, 93, 123, 125, 0x1D7CF]))
        with suppress(DocumentError):
            parse_json("".join(text))
