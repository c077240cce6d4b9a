"""Padding of training calls: nothing lost, nothing twice, and every mini-batch gets its share of responses."""

from hypothesis import given
from hypothesis import strategies as st

from asyppo_verl.layout import incomplete_groups, padding_needed, spread, training_order


def test_padding_by_hand():
    assert padding_needed([32, 32], 16) == 0
    assert padding_needed([31, 32], 16) == 1
    assert padding_needed([17, 40], 16) == 15
    assert padding_needed([0, 5], 4) == 3


def test_incomplete_groups_by_hand():
    sessions = [("a", "0"), ("a", "1"), ("b", "0"), ("b", "0"), ("c", "7"), ("c", "3")]
    assert incomplete_groups(sessions, 2) == 1 and incomplete_groups(sessions, 1) == 0 and incomplete_groups([], 2) == 0


def test_training_order_by_hand():
    # Two ranks; rows 0 to 4 are responses, 5 to 7 padding.
    assert training_order(5, [[4, 0, 2, 6], [1, 5, 3, 7]]) == [0, 2, 4, 6, 1, 5, 3, 7]


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


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=8),
    st.integers(1, 4),
    st.integers(1, 4),
    st.randoms(use_true_random=False),
)
def test_ranks_run_the_same_number_of_steps_and_every_step_has_a_response(sizes, ranks, per_rank, rng):
    """Any shard sizes, ranks and mini-batches: whatever rank a row goes to, no step rests on padding alone."""
    mini_batch = ranks * per_rank
    available = padding_needed(sizes, mini_batch)
    for size in filter(None, sizes):
        padding = -size % mini_batch
        assert padding <= available
        rows = rng.sample(range(size + padding), size + padding)
        length = len(rows) // ranks
        order = training_order(size, [rows[r * length : (r + 1) * length] for r in range(ranks)])
        assert sorted(order) == list(range(size + padding))
        by_rank = [order[r * length : (r + 1) * length] for r in range(ranks)]
        for step in range(length // per_rank):
            together = [row for rank in by_rank for row in rank[step * per_rank : (step + 1) * per_rank]]
            assert any(row < size for row in together)
