"""Errors keep their fields, print as one line, and survive being sent between processes."""

import pickle

import pytest

from featcache import errors
from featcache.errors import FeatcacheError, StoreError, some_of

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, FeatcacheError)]
FIELDS = {"expected": "5 rows", "found": 3, "remedy": "run it again"}


@pytest.mark.parametrize("kind", KINDS)
def test_fields_are_kept_as_text_and_printed_as_one_line(kind):
    error = kind("a.npy", **FIELDS)
    assert (error.where, error.expected, error.found, error.remedy) == ("a.npy", "5 rows", "3", "run it again")
    assert str(error) == "a.npy: expected 5 rows; found 3; run it again"


def test_a_message_may_name_no_place():
    assert str(FeatcacheError(**FIELDS)) == "expected 5 rows; found 3; run it again"


@pytest.mark.parametrize(("where", "inside"), [("a.npy", "step 2: a.npy"), ("", "step 2")])
def test_a_larger_place_comes_first_and_the_kind_stays(where, inside):
    error = StoreError(where, **FIELDS)
    outer = error.inside("step 2")
    assert type(outer) is StoreError and outer.where == inside and error.where == where
    assert str(outer) == f"{inside}: expected 5 rows; found 3; run it again"


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_is_the_same_after_pickling(kind):
    error = kind("a.npy", **FIELDS)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind and vars(copy) == vars(error) and str(copy) == str(error)


def test_many_names_are_counted_and_few_are_listed():
    assert some_of(["a"]) == "'a'" and some_of(list("abc")) == "'a', 'b', 'c'"
    assert some_of([f"model {n}" for n in range(24)]) == "24, such as 'model 0', 'model 1', 'model 2'"


def test_a_text_from_a_file_stays_one_line_and_moves_no_cursor():
    error = FeatcacheError("a\nb\u2028.npy", expected="x", found="\x1b[2J" + "y" * 1_000_000, remedy="é ok")
    assert len(str(error).splitlines()) == 1 and len(str(error)) < 10_000 and "\x1b" not in str(error)
    assert str(error).startswith("a\\nb\\u2028.npy: expected x; found \\x1b[2Jyyy") and str(error).endswith("; é ok")
