"""avg@k, pass@k, maj@k and their intervals: against hand-worked numbers, plain enumeration and simulation."""

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.asyppo.evaluation.score import Estimate, bootstrap, estimate, majority, normalise, pass_at_k, powers


def test_pass_at_k_by_hand():
    # 4 samples, 1 right: 3 of the 6 pairs hold it. 2 right: 1 of the 6 pairs holds none.
    assert pass_at_k(1, 4, 2) == pytest.approx(3 / 6)
    assert pass_at_k(2, 4, 2) == pytest.approx(5 / 6)


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(is_correct, data):
    k = data.draw(st.integers(1, len(is_correct)))
    subsets = list(combinations(is_correct, k))
    assert pass_at_k(sum(is_correct), len(is_correct), k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_survives_large_counts():
    assert pass_at_k(1, 4096, 2048) == pytest.approx(0.5)


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_k_refuses_more_than_there_is(k):
    with pytest.raises(ValueError, match=rf"k={k}, samples=4"):
        pass_at_k(1, 4, k)


def test_powers():
    assert powers(1) == [1]
    assert powers(8) == [1, 2, 4, 8]
    assert powers(12) == [1, 2, 4, 8, 12]


@pytest.mark.parametrize(
    ("answers", "is_correct", "expected"),
    [
        (["3", "3", "5"], [True, True, False], 1),
        (["3", "5", "5"], [True, False, False], 0),
        (["3", "5"], [True, False], 1 / 2),  # a tie, one of two is right
        (["3", "3", "5", "5", "7"], [True, True, False, False, False], 1 / 2),
        ([None, None, "", "3"], [False, False, False, True], 1),  # only answers vote
        ([None, "$"], [False, False], 0),
        ([" 3 ", "$3$", "3.", "5", "5"], [True, True, True, False, False], 1),  # one answer in three spellings
    ],
)
def test_majority_by_hand(answers, is_correct, expected):
    assert majority(answers, is_correct) == pytest.approx(expected)


@given(st.lists(st.sampled_from([None, "a", "b", "c"]), min_size=1, max_size=7))
def test_majority_is_a_vote_with_random_ties(answers):
    """Against a loop that breaks the tie in every way; "a" is right."""
    counts = {answer: answers.count(answer) for answer in set(answers) - {None}}
    winners = [answer for answer in counts if counts[answer] == max(counts.values())]
    expected = winners.count("a") / len(winners) if winners else 0
    assert majority(answers, [answer == "a" for answer in answers]) == pytest.approx(expected)


def test_normalise_keeps_what_makes_answers_differ():
    assert normalise("\\frac{1}{2}") != normalise("\\frac{1}{3}")
    assert normalise("0.5") == "0.5"
    assert normalise("x ^ 2") == "x^2"
    assert normalise(12) == "12"


def test_bootstrap_draws_from_the_right_distribution():
    """Two problems, one right: the mean of two draws is 0, 1/2, 1 with probability 1/4, 1/2, 1/4."""
    means_D1 = bootstrap([[0], [1]], seed=(0,), draws=40_000)
    values, counts = np.unique(means_D1, return_counts=True)
    assert values.tolist() == [0, 0.5, 1]
    np.testing.assert_allclose(counts / 40_000, [0.25, 0.5, 0.25], atol=0.01)


def test_all_columns_of_a_draw_see_the_same_problems():
    values_P = np.random.default_rng(1).random(50)
    means_D2 = bootstrap(np.stack([values_P, 1 - values_P], axis=1), seed=(3,), draws=500)
    np.testing.assert_allclose(means_D2.sum(axis=1), 1)
    assert means_D2[:, 0].std() > 0.01


def test_the_interval_matches_every_possible_resample():
    """Four problems have 4^4 resamples; the quantiles of all of them are the answer."""
    values_P = [0.0, 0.25, 1.0, 1.0]
    exact = np.quantile([np.mean(draw) for draw in product(values_P, repeat=4)], [0.025, 0.975])
    table, _ = estimate({"bench": {"avg": values_P}}, draws=200_000)
    assert table["bench"]["avg"].value == pytest.approx(0.5625)
    # The means lie on a grid of 1/16.
    np.testing.assert_allclose([table["bench"]["avg"].low, table["bench"]["avg"].high], exact, atol=1e-9)


def test_95_percent_of_the_intervals_hold_the_truth():
    """400 benchmarks of 150 problems, each solved with its own probability; the mean of the probabilities is 0.4."""
    rng = np.random.default_rng(7)
    held = 0
    for _ in range(400):
        solved_P = rng.random(150) < rng.beta(2, 3, size=150)
        interval = estimate({"bench": {"avg": solved_P}}, draws=1000)[0]["bench"]["avg"]
        held += interval.low <= 0.4 <= interval.high
    assert 0.92 < held / 400 < 0.98


def test_the_average_weighs_benchmarks_not_problems():
    """Means 1 and 0 average to 1/2, however many problems each has; a benchmark without spread adds none."""
    table, average = estimate({"small": {"avg": [1, 1]}, "large": {"avg": [0] * 98}})
    assert table["small"]["avg"] == Estimate(1, 1, 1)
    assert average["avg"] == Estimate(0.5, 0.5, 0.5)


def test_benchmarks_are_resampled_independently():
    """Independent benchmarks with equal spread: the average has 1/sqrt(2) of it. Shared draws would give all of it."""
    values_P = np.random.default_rng(5).random(200)
    table, average = estimate({"a": {"avg": values_P}, "b": {"avg": values_P}}, draws=20_000)
    width = table["a"]["avg"].high - table["a"]["avg"].low
    assert (average["avg"].high - average["avg"].low) / width == pytest.approx(0.5**0.5, rel=0.03)


def test_the_average_has_only_what_every_benchmark_has():
    _, average = estimate({"a": {"avg": [1], "maj": [1]}, "b": {"avg": [0]}})
    assert set(average) == {"avg"}


def test_the_same_seed_gives_the_same_interval():
    data = {"bench": {"avg": np.random.default_rng(2).random(30)}}
    assert estimate(data, seed=1) == estimate(data, seed=1)
    assert estimate(data, seed=1) != estimate(data, seed=2)
