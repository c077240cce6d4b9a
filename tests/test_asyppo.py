"""The algorithm: hand-made cases, plain-loop oracles, and laws 1, 3 and 4."""

import math
import statistics
from collections import Counter
from decimal import Decimal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyppo_verl import order_statistics
from asyppo_verl.asyppo import (
    assign_shards,
    ensemble_value,
    filter_entropy,
    keep_advantage,
    keep_entropy,
    mask_advantage,
    select_tokens,
)
from asyppo_verl.order_statistics import count_of, kth_lowest

# -- shards --------------------------------------------------------------------------------------------------------

groups = st.dictionaries(st.text("abcdef0123456789-", min_size=1, max_size=6), st.integers(1, 11), max_size=6)
critics = st.integers(1, 8)


def rows_of(sizes: dict[str, int], outputs: int = 1) -> list[tuple[str, str]]:
    return [(group, str(session)) for group, size in sizes.items() for session in range(size) for _ in range(outputs)]


def test_shards_by_hand():
    rows = [("g", "0"), ("g", "1"), ("g", "2"), ("g", "3")]
    assert assign_shards(rows, num_critics=2) == [0, 1, 0, 1]
    assert assign_shards(rows, num_critics=4) == [0, 1, 2, 3]
    assert assign_shards(rows[::-1], num_critics=2) == [1, 0, 1, 0]


def test_sessions_are_dealt_in_the_order_of_their_numbers():
    rows = [("g", str(session)) for session in range(12)]
    # With two critics the order of the texts, 0, 1, 10, 11, 2, would deal them out alike.
    assert assign_shards(rows, num_critics=3) == [0, 1, 2] * 4


@given(groups, critics, st.integers(1, 3))
def test_law_1_group_shards_are_even_and_whole_sessions(sizes, num_critics, outputs):
    rows = rows_of(sizes, outputs)
    owner = assign_shards(rows, num_critics=num_critics)
    assert len(owner) == len(rows) and set(owner) <= set(range(num_critics))
    critic_of = dict(zip(rows, owner, strict=True))
    assert [critic_of[row] for row in rows] == owner, "the rows of a session went to different critics"
    for group, size in sizes.items():
        count = Counter(critic_of[group, str(session)] for session in range(size))
        shares = [count[critic] for critic in range(num_critics)]
        assert sum(shares) == size and max(shares) - min(shares) <= 1


@given(groups, critics, st.randoms(use_true_random=False), st.sampled_from(["group", "prompt"]))
def test_law_1_shards_depend_only_on_ids_inside_the_group(sizes, num_critics, rng, shard):
    rows = rows_of(sizes)
    critic_of = dict(zip(rows, assign_shards(rows, num_critics=num_critics, shard=shard), strict=True))
    shuffled = rng.sample(rows, len(rows))
    assert assign_shards(shuffled, num_critics=num_critics, shard=shard) == [critic_of[row] for row in shuffled]
    for group in sizes:
        alone = [row for row in rows if row[0] == group]
        assert assign_shards(alone, num_critics=num_critics, shard=shard) == [critic_of[row] for row in alone]


@given(groups, critics)
def test_prompt_shards_keep_groups_whole(sizes, num_critics):
    rows = rows_of(sizes)
    owners = {}
    for (group, _), critic in zip(rows, assign_shards(rows, num_critics=num_critics, shard="prompt"), strict=True):
        owners.setdefault(group, set()).add(critic)
    assert all(len(found) == 1 for found in owners.values())


@pytest.mark.parametrize("shard", ["group", "prompt"])
def test_remainders_and_whole_groups_favour_no_critic(shard):
    # Without M dividing 3 the extra response of a group, or the group itself, should go to each of two critics half the
    # time: 2000 draws have a standard deviation of 22.
    owner = assign_shards([(f"group-{g}", str(s)) for g in range(2000) for s in range(3)], num_critics=2, shard=shard)
    extra = sum(statistics.mode(owner[3 * g : 3 * g + 3]) == 0 for g in range(2000))
    assert 900 < extra < 1100


def test_shards_are_the_same_in_every_process():
    # Written down once: hash() of text would differ from process to process.
    assert assign_shards([("a", "0"), ("b", "0"), ("c", "0"), ("d", "0")], num_critics=3) == [0, 2, 0, 0]


@pytest.mark.parametrize(
    ("kwargs", "message"), [({"num_critics": 0}, "num_critics=0"), ({"num_critics": 2, "shard": "row"}, "shard='row'")]
)
def test_shards_refuse_bad_input(kwargs, message):
    with pytest.raises(ValueError, match=message):
        assign_shards([("g", "0")], **kwargs)


# -- mean and sigma ------------------------------------------------------------------------------------------------


def test_ensemble_by_hand():
    # Means 2 and 0; deviations 1 and 2 around them.
    value_BT, sigma_BT = ensemble_value(torch.tensor([[[1.0, -2.0]], [[3.0, 2.0]]]))
    assert value_BT.tolist() == [[2.0, 0.0]] and sigma_BT.tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize("num_critics", range(1, 7))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_ensemble_is_mean_and_population_deviation(num_critics, dtype):
    values_MBT = torch.randn(num_critics, 5, 9, generator=torch.Generator().manual_seed(num_critics)).to(dtype)
    value_BT, sigma_BT = ensemble_value(values_MBT)
    exact = values_MBT.double()
    assert value_BT.dtype == sigma_BT.dtype == torch.float32
    torch.testing.assert_close(value_BT, exact.mean(0).float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sigma_BT, exact.std(0, correction=0).float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_critics", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_critics_have_exactly_zero_sigma_and_their_own_value(num_critics, dtype):
    values_BT = torch.randn(40, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    value_BT, sigma_BT = ensemble_value(values_BT.expand(num_critics, -1, -1).clone())
    assert torch.equal(value_BT, values_BT.float()) and not sigma_BT.any()


@pytest.mark.parametrize("num_critics", [2, 3, 4, 6])
def test_law_3_the_order_of_the_critics_changes_no_bit(num_critics):
    generator = torch.Generator().manual_seed(1)
    values_MBT = torch.randn(num_critics, 30, 40, generator=generator) * 10
    expected = ensemble_value(values_MBT)
    for _ in range(5):
        shuffled = ensemble_value(values_MBT[torch.randperm(num_critics, generator=generator)])
        assert all(torch.equal(a, b) for a, b in zip(expected, shuffled, strict=True))


@pytest.mark.parametrize("num_critics", range(1, 7))
def test_the_stretches_in_which_tokens_are_worked_on_change_no_bit(num_critics, monkeypatch):
    values_MBT = torch.randn(num_critics, 30, 41, generator=torch.Generator().manual_seed(2)) * 10
    whole = ensemble_value(values_MBT)
    for chunk in (1, 7, 64):
        monkeypatch.setattr(order_statistics, "CHUNK", chunk)
        assert all(torch.equal(a, b) for a, b in zip(whole, ensemble_value(values_MBT), strict=True))


def test_ensemble_leaves_its_input_alone():
    values_MBT = torch.randn(3, 4, 5)
    before = values_MBT.clone()
    ensemble_value(values_MBT)
    assert torch.equal(values_MBT, before)


# -- selections ----------------------------------------------------------------------------------------------------


def drop_by_loop(sigma: list[float], is_response: list[bool], fraction: float, largest: bool) -> list[bool]:
    """The rule in plain Python: True = used."""
    tokens = [t for t, real in enumerate(is_response) if real]
    if all(sigma[t] == 0 for t in tokens):
        return [True] * len(sigma)
    ranked = sorted(tokens, key=lambda t: (-sigma[t] if largest else sigma[t], t))
    dropped = set(ranked[: math.floor(Decimal(str(fraction)) * len(tokens))])
    return [t not in dropped for t in range(len(sigma))]


def test_selections_by_hand():
    sigma_BT = torch.tensor([[0.3, 0.1, 9.0], [0.1, 0.2, 0.3]])
    is_response_BT = torch.tensor([[True, True, False], [True, True, True]])
    # Five response tokens, so 0.4 is two: the two 0.1, and the two 0.3; the 9.0 is no response token.
    assert keep_advantage(sigma_BT, is_response_BT, fraction=0.4).tolist() == [[True, False, True], [False, True, True]]
    assert keep_entropy(sigma_BT, is_response_BT, fraction=0.4).tolist() == [[False, True, True], [True, True, False]]
    # 0.2 is one token, and the earlier of two equals goes.
    assert keep_advantage(sigma_BT, is_response_BT, fraction=0.2).tolist() == [[True, False, True], [True, True, True]]
    assert keep_entropy(sigma_BT, is_response_BT, fraction=0.2).tolist() == [[False, True, True], [True, True, True]]


tokens = st.lists(
    st.tuples(
        st.one_of(st.sampled_from([0.0, -0.0, 0.5, 0.25, 1e-40, 1e30]), st.floats(0, 4, width=32)), st.booleans()
    ),
    min_size=1,
    max_size=60,
)


@given(tokens, st.floats(0, 0.99), st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]))
def test_selections_equal_a_plain_loop_with_ties_and_holes(drawn, fraction, dtype):
    sigma, is_response = torch.tensor([s for s, _ in drawn], dtype=dtype), [r for _, r in drawn]
    for keep, largest in ((keep_advantage, False), (keep_entropy, True)):
        kept = keep(sigma, torch.tensor(is_response), fraction=fraction)
        assert kept.tolist() == drop_by_loop(sigma.tolist(), is_response, fraction, largest)


def test_fractions_are_the_decimals_that_were_written():
    assert [count_of(fraction, 100) for fraction in (0.29, 0.57, 0.58, 0.07, 0.999, 0)] == [29, 57, 58, 7, 99, 0]
    # No multiple of a hundredth loses a token to binary fractions, at the size of a large batch as well.
    for hundredths in range(100):
        assert count_of(hundredths / 100, 100 << 20) == hundredths << 20
    sigma = torch.arange(1.0, 101)
    assert int((~keep_advantage(sigma, torch.ones(100), fraction=0.29)).sum()) == 29


def test_both_selections_of_a_step():
    sigma, is_response = torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0]), torch.tensor([1, 1, 1, 1, 0])
    keep_adv, keep_ent = select_tokens(sigma, is_response, adv_mask_fraction=0.5, entropy_filter_fraction=0.25)
    assert keep_adv.tolist() == [True, False, False, True, True]
    assert keep_ent.tolist() == [True, True, True, False, True]


@pytest.mark.parametrize("keep", [keep_advantage, keep_entropy])
def test_no_disagreement_drops_nothing(keep):
    is_response_BT = torch.tensor([[True, True, True, False]])
    assert keep(torch.zeros(1, 4), is_response_BT, fraction=0.5).all()
    assert keep(torch.tensor([[0.0, 0.0, -0.0, 7.0]]), is_response_BT, fraction=0.5).all()
    # Equal but positive sigma is a signal with ties: the earliest token goes.
    assert keep(torch.full((1, 4), 0.5), is_response_BT, fraction=0.5).tolist() == [[False, True, True, True]]


@pytest.mark.parametrize("keep", [keep_advantage, keep_entropy])
def test_empty_and_switched_off(keep):
    assert keep(torch.rand(2, 3), torch.zeros(2, 3, dtype=torch.bool), fraction=0.5).all()
    assert keep(torch.rand(2, 3), torch.ones(2, 3, dtype=torch.bool), fraction=0.0).all()
    assert keep(torch.rand(0, 3), torch.ones(0, 3, dtype=torch.bool), fraction=0.5).shape == (0, 3)


@pytest.mark.parametrize("keep", [keep_advantage, keep_entropy])
@pytest.mark.parametrize("fraction", [-0.1, 1.0, 1.5, float("nan")])
def test_fraction_out_of_range(keep, fraction):
    with pytest.raises(ValueError, match="fraction"):
        keep(torch.rand(2), torch.ones(2, dtype=torch.bool), fraction=fraction)


@pytest.mark.parametrize("keep", [keep_advantage, keep_entropy])
def test_shapes_must_agree(keep):
    with pytest.raises(ValueError, match="shapes differ"):
        keep(torch.rand(2, 3), torch.ones(6, dtype=torch.bool), fraction=0.5)


def disagreement(seed: int = 0, rows: int = 12, width: int = 17) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct sigmas and a mask with holes."""
    generator = torch.Generator().manual_seed(seed)
    sigma_BT = (torch.randperm(rows * width, generator=generator).float() + 1).view(rows, width) / 64
    return sigma_BT, torch.rand(rows, width, generator=generator) < 0.8


@pytest.mark.parametrize("keep", [keep_advantage, keep_entropy])
def test_law_3_rows_and_padding(keep):
    sigma_BT, is_response_BT = disagreement()
    kept_BT = keep(sigma_BT, is_response_BT, fraction=0.25)
    order = torch.randperm(len(sigma_BT), generator=torch.Generator().manual_seed(3))
    assert torch.equal(keep(sigma_BT[order], is_response_BT[order], fraction=0.25), kept_BT[order])
    # Padding with the lowest and the highest sigma, which must not be seen.
    for filler in (0.0, 1e9):
        wide = torch.nn.functional.pad(sigma_BT, (0, 5, 0, 3), value=filler)
        wide_response = torch.nn.functional.pad(is_response_BT, (0, 5, 0, 3))
        assert torch.equal(keep(wide, wide_response, fraction=0.25)[: len(sigma_BT), :-5], kept_BT)


def test_law_4_shifted_and_scaled_values():
    # Eighths: adding whole numbers and multiplying by powers of two is exact.
    generator = torch.Generator().manual_seed(5)
    values_MBT = torch.randint(-64, 64, (3, 9, 13), generator=generator) / 8
    is_response_BT = torch.rand(9, 13, generator=generator) < 0.8
    _, sigma_BT = ensemble_value(values_MBT)
    _, shifted_BT = ensemble_value(values_MBT + 5)
    assert torch.equal(sigma_BT, shifted_BT)
    _, scaled_BT = ensemble_value(values_MBT * 4)
    for keep in (keep_advantage, keep_entropy):
        expected = keep(sigma_BT, is_response_BT, fraction=0.3)
        assert torch.equal(keep(scaled_BT, is_response_BT, fraction=0.3), expected)


@given(
    st.lists(st.one_of(st.floats(-5, 5, width=32), st.floats(allow_nan=False, width=32)), min_size=1, max_size=40),
    st.sampled_from([torch.float32, torch.float64]),
    st.data(),
)
def test_kth_scores(scores, dtype, data):
    ks = data.draw(st.lists(st.integers(1, len(scores)), min_size=1, max_size=5))
    found = kth_lowest(torch.tensor(scores, dtype=dtype), torch.ones(len(scores), dtype=torch.bool), ks)
    assert found.tolist() == [sorted(scores)[k - 1] for k in ks]


def test_mask_and_filter_keep_the_other_bits():
    x, keep = torch.randn(50), torch.rand(50) < 0.5
    for apply in (mask_advantage, filter_entropy):
        assert torch.equal(apply(x, keep)[keep], x[keep]) and not apply(x, keep)[~keep].any()


def test_filtered_tokens_have_exactly_zero_gradient():
    entropy = torch.tensor([1.0, float("inf"), 2.0], requires_grad=True)
    filter_entropy(entropy, torch.tensor([True, False, True])).sum().backward()
    assert entropy.grad.tolist() == [1.0, 0.0, 1.0]
