"""Padding of training calls: nothing lost, nothing twice, and every mini-batch gets its share of responses."""

from hypothesis import given
from hypothesis import strategies as st

from asyppo_verl.mini_batches import cut, incomplete_groups, mini_batches, rank_major, rows_per_rank, step_count


def test_steps_by_hand():
    # verl's critic makes 40 / 10 = 4 steps; a shard of three responses allows three, an empty one does not count.
    assert step_count(40, 10, [20, 20]) == 4
    assert step_count(40, 10, [3, 37]) == 3
    assert step_count(40, 10, [0, 40]) == 4


def test_cuts_by_hand():
    assert cut([1, 2, 3, 4, 5, 6, 7], 3) == [[1, 2], [3, 4], [5, 6, 7]]
    assert rows_per_rank([[1, 2], [3, 4], [5, 6, 7]], 2) == 2 and rows_per_rank([[1, 2, 3]], 2, multiple=4) == 4
    assert rows_per_rank([[1]], 8) == 1 and rows_per_rank([range(8)], 2, multiple=2) == 4


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


@given(st.lists(st.integers(0, 60), min_size=1, max_size=4).filter(any), st.integers(1, 8), st.integers(1, 8))
def test_critics_make_equally_many_even_steps_and_lose_nothing(sizes, mini_batch, steps):
    count = step_count(steps * mini_batch, mini_batch, sizes)
    assert 1 <= count <= steps
    for size in filter(None, sizes):
        made = cut(range(size), count)
        lengths = [len(step) for step in made]
        assert [row for step in made for row in step] == list(range(size))
        assert len(made) == count and min(lengths) >= 1 and max(lengths) - min(lengths) <= 1
        for ranks, multiple in ((1, 1), (2, 1), (3, 4)):
            rows = rows_per_rank(made, ranks, multiple)
            assert rows % multiple == 0 and max(lengths) <= rows * ranks < max(lengths) + ranks * multiple


@given(st.integers(1, 5), st.integers(1, 8), st.integers(1, 4), st.randoms(use_true_random=False))
def test_verl_cuts_rank_major_rows_into_the_steps_they_were_made_of(steps, ranks, per_rank, rng):
    rows = rng.sample(range(1000), steps * ranks * per_rank)
    made = mini_batches(rows, ranks * per_rank)
    parts = [[step[rank * per_rank : (rank + 1) * per_rank] for rank in range(ranks)] for step in made]
    assert mini_batches(rank_major(parts), ranks * per_rank, ranks=ranks) == made
