"""Padding of training calls: nothing lost, nothing twice, and every mini-batch gets its share of responses."""

from hypothesis import given
from hypothesis import strategies as st

from asyppo_verl.layout import padding_needed, spread


def test_padding_by_hand():
    assert padding_needed([32, 32], [16, 16]) == 0
    assert padding_needed([31, 32], [16, 16]) == 1
    assert padding_needed([17, 40], [16, 16]) == 15
    assert padding_needed([0, 5], [4, 4]) == 3


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
