"""Names side by side lose the words that all of them have, and stay different names."""

import pytest

from heads.fit.short_names import split_names, without_digits

LITE = "tf_efficientnet_lite{}@224 {} 7x7 linear {} {}"


def test_words_of_all_names_are_said_once():
    names = [LITE.format(0, "5 layers", "ridge", "1a2b3c"), LITE.format(1, "5 layers", "smooth_l1", "0000ff")]
    assert split_names(names) == (
        "5 layers 7x7 linear",
        ["tf_efficientnet_lite0@224 ridge 1a2b3c", "tf_efficientnet_lite1@224 smooth_l1 0000ff"],
    )


def test_a_number_that_differs_keeps_the_words_beside_it():
    names = [LITE.format(0, layers, "ridge", digits) for layers, digits in (("5 layers", "123456"), ("3 layers", "9"))]
    shared, rests = split_names([names[0], names[1].replace(" 9", " 654321")])
    assert shared == "7x7 linear ridge"
    assert rests == ["tf_efficientnet_lite0@224 5 layers 123456", "tf_efficientnet_lite0@224 3 layers 654321"]
    assert split_names(["a seed 1 rate 0.5 0a0a0a", "a seed 2 rate 0.5 0b0b0b"]) == (
        "a 0.5",
        ["seed 1 rate 0a0a0a", "seed 2 rate 0b0b0b"],
    )


@pytest.mark.parametrize("names", [["a b c"], ["a b", "a"], ["a b", "a b"]])
def test_names_of_which_nothing_would_be_left_stay(names):
    assert split_names(names) == ("", names)


def test_digits_are_left_out_where_names_differ_without_them():
    assert without_digits(["lite0 1a2b3c", "lite1 1a2b3d"]) == ["lite0", "lite1"]
    assert without_digits(["lite0 1a2b3c", "lite0 1a2b3d"]) == ["lite0 1a2b3c", "lite0 1a2b3d"]
    assert without_digits(["1a2b3c", "lite0"]) == ["1a2b3c", "lite0"]
