"""Padding of training calls: nothing lost, nothing twice, and every mini-batch gets its share of responses."""

from hypothesis import given
from hypothesis import strategies as st

from asyppo_verl.mini_batches import incomplete_groups, mini_batches, padding_needed, rank_major, spread


def test_padding_by_hand():
    assert padding_needed([32, 32], 16) == 0
    assert padding_needed([31, 32], 16) == 1
    assert padding_needed([17, 40], 16) == 15
    assert padding_needed([0, 5], 4) == 3


def test_incomplete_groups_by_hand():
    sessions = [("a", "0"), ("a", "1"), ("b", "0"), ("b", "0"), ("c", "7"), ("c", "3")]
    assert incomplete_groups(sessions, 2) == 1 and incomplete_groups(sessions, 1) == 0 and incomplete_groups([], 2) == 0


def test_mini_batches_by_hand():
    rows = [0, 1, 2, 3, 4, 5, 6, 7]
    assert mini_batches(rows, 4) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    # Each of two ranks has four rows and gives two of them to every step.
    assert mini_batches(rows, 4, ranks=2) == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_rank_major_by_hand():
    # Two steps of two ranks.
    assert rank_major([[[7, 1], [4, 2]], [[3, 0], [6, 5]]]) == [7, 1, 3, 0, 4, 2, 6, 5]


def test_spread_by_hand():
    assert spread([1, 2, 3, 4], []) == [1, 2, 3, 4]
    assert spread([1, 2, 3, 4], [8, 9]) == [1, 2, 8, 3, 4, 9]
    assert spread([], [8, 9]) == [8, 9]


@given(st.integers(1, 60), st.integers(1, 8))
def test_every_mini_batch_holds_a_response_and_nothing_is_lost(responses, mini_batch):
    padding = -responses % mini_batch
    rows = spread(range(responses), range(1000, 1000 + padding))
    assert sorted(rows) == [*range(responses), *range(1000, 1000 + padding)]
    assert [row for row in rows if row < 1000] == list(range(responses)), "responses changed their order"
    held = [sum(row < 1000 for row in rows[i : i + mini_batch]) for i in range(0, len(rows), mini_batch)]
    assert min(held) >= 1 and max(held) - min(held) <= 1


@given(st.integers(1, 5), st.integers(1, 8), st.integers(1, 4), st.randoms(use_true_random=False))
def test_verl_cuts_rank_major_rows_into_the_steps_they_were_made_of(steps, ranks, per_rank, rng):
    rows = rng.sample(range(1000), steps * ranks * per_rank)
    made = mini_batches(rows, ranks * per_rank)
    parts = [[step[rank * per_rank : (rank + 1) * per_rank] for rank in range(ranks)] for step in made]
    assert mini_batches(rank_major(parts), ranks * per_rank, ranks=ranks) == made
