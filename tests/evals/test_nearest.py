"""Copying the nearest plan."""

import math

import numpy as np
import pytest

from egjax.evals.nearest import copy_plans, nearest

KNOWN = ["wash the cup", "wash the dog", "read the book in bed"]


def test_similarity_by_hand():
    """idf of the shared word is 1, of the others ln(3/2) + 1, of an unknown one ln 3 + 1."""
    w = math.log(3 / 2) + 1
    _, similarity = nearest(["a b", "a c"], ["a b"])
    assert similarity[0] == pytest.approx(1.0)
    index, similarity = nearest(["a c", "a d"], ["a b"])
    unknown = math.log(3) + 1
    assert index[0] == 0
    assert similarity[0] == pytest.approx(1 / (math.sqrt(1 + w**2) * math.sqrt(1 + unknown**2)))


def test_a_known_text_finds_itself():
    index, similarity = nearest(KNOWN, KNOWN)
    np.testing.assert_array_equal(index, [0, 1, 2])
    np.testing.assert_allclose(similarity, 1.0)


def test_rare_words_count_more_than_common_ones():
    index, _ = nearest([*KNOWN, "wash the car"], ["the book wash"])
    assert index[0] == 2


def test_order_and_repetition_of_words_do_not_matter():
    index, similarity = nearest(KNOWN, ["DOG, dog! the wash", "Wash the dog"])
    np.testing.assert_array_equal(index, [1, 1])
    assert similarity[0] == pytest.approx(similarity[1])


def test_of_equals_the_first_wins():
    index, _ = nearest(["x y", "y x", "x y"], ["x y", "nothing known"])
    np.testing.assert_array_equal(index, [0, 0])


def test_each_text_asked_is_looked_up_alone():
    asked = ["dog", "bed", "cup and book"]
    together, _ = nearest(KNOWN, asked)
    alone = [nearest(KNOWN, [text])[0][0] for text in asked]
    np.testing.assert_array_equal(together, alone)


def test_copies_the_plan():
    assert copy_plans(KNOWN, ["p0", "p1", "p2"], ["a book", "a dog"]) == ["p2", "p1"]
    with pytest.raises(ValueError, match="3 prompts for 1 plans"):
        copy_plans(KNOWN, ["p0"], ["a"])
    with pytest.raises(ValueError, match="no training"):
        copy_plans([], [], ["a"])
