"""Text metrics against hand computation and brute force."""

import itertools

import numpy as np
import pytest

from egjax.evals.text import (
    correct,
    length_normalised,
    path_overlap,
    rooms,
    rouge_l,
    unconditional,
)


def test_rouge_by_hand():
    """LCS "walk to kitchen" of 4 and 5 words: P = 3/4, R = 3/5, F = 2/3; stems are equal."""
    assert rouge_l(["Walk to kitchen now"], ["Walk to the big kitchen"])[0] == pytest.approx(2 / 3)
    assert rouge_l(["walking kitchens"], ["walk kitchen"])[0] == pytest.approx(1.0)
    assert rouge_l([""], ["walk"])[0] == 0


def test_rouge_refuses_unequal_lengths():
    with pytest.raises(ValueError, match="2 predictions"):
        rouge_l(["a", "b"], ["a"])


def brute_force(a, b) -> float:
    """The longest contiguous run of `a` that is one of `b`, tried one by one."""
    runs = [a[i:j] for i in range(len(a) + 1) for j in range(i, len(a) + 1)]
    inside = {tuple(b[i:j]) for i in range(len(b) + 1) for j in range(i, len(b) + 1)}
    longest = max(len(run) for run in runs if tuple(run) in inside)
    return longest / max(len(a), len(b))


def test_path_overlap_against_brute_force():
    words = list(itertools.chain.from_iterable(itertools.product("ab", repeat=n) for n in range(5)))
    for a, b in itertools.product(words, words):
        if a or b:
            assert path_overlap(a, b) == brute_force(list(a), list(b)), (a, b)
    assert path_overlap([], []) == 1


def test_path_is_a_run_not_a_subsequence():
    assert path_overlap(["kitchen", "hall", "bedroom"], ["kitchen", "bedroom"]) == 1 / 3


def test_rooms_of_an_answer():
    assert rooms(" Bedroom, dining_room , home office.") == [
        "bedroom",
        "dining room",
        "home office",
    ]
    assert rooms("") == []


def test_a_longer_choice_is_not_punished():
    logps, lengths = np.array([[-4.0, -6.0]]), np.array([[2, 6]])
    assert correct(logps, np.array([0])).all()
    assert correct(length_normalised(logps, lengths), np.array([1])).all()


def test_a_choice_that_is_always_likely_is_not_preferred():
    logps, prior = np.array([[-2.0, -5.0]]), np.array([[-1.0, -9.0]])
    assert correct(unconditional(logps, prior), np.array([1])).all()
    np.testing.assert_allclose(unconditional(logps, prior), [[-1.0, 4.0]])


def test_masked_choices_never_matter():
    rng = np.random.default_rng(0)
    scores, answers = rng.normal(size=(50, 3)), rng.integers(0, 3, 50)
    padded = np.concatenate([scores, np.full((50, 2), 99.0)], axis=1)
    mask = np.arange(5) < 3
    right = correct(padded, answers, np.broadcast_to(mask, (50, 5)))
    np.testing.assert_array_equal(right, correct(scores, answers))
    np.testing.assert_array_equal(right, scores.argmax(1) == answers)


def test_a_tie_is_wrong():
    assert not correct(np.array([[1.0, 1.0]]), np.array([0])).any()
    assert not correct(np.full((1, 2), -np.inf), np.array([0])).any()


def test_refuses_impossible_answers():
    scores = np.zeros((1, 2))
    for answers, mask, message in [
        (np.array([2]), None, "not among"),
        (np.array([1]), np.array([[True, False]]), "masked"),
    ]:
        with pytest.raises(ValueError, match=message):
            correct(scores, answers, mask)
    with pytest.raises(ValueError, match="not a number"):
        correct(np.array([[np.nan, 0.0]]), np.array([1]))
