"""Padding of training calls: nothing lost, nothing twice, and every mini-batch gets its share of responses."""

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
