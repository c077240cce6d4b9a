"""From groups to optimizer steps, on any numbers: no response is lost, none is used twice, and no rank waits for another.

The parts have their own tests; here they are put together as a training step does, with verl's own balancing and cutting.
"""

import math
from collections import Counter

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from verl.utils.seqlen_balancing import calculate_workload, get_seqlen_balanced_partitions

from asyppo_verl.asyppo import assign_shards, ensemble_value, keep_advantage, keep_entropy
from asyppo_verl.batch_io import Responses
from asyppo_verl.mini_batches import mini_batches, padding_needed, rank_major, spread

critics = st.integers(1, 8)
ranks = st.integers(1, 8)
# Sessions of each group and the lengths of their responses: up to 11 sessions, so often fewer than critics.
groups = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=11), min_size=1, max_size=9)
randoms = st.randoms(use_true_random=False)


def optimizer_steps(rows: list[int], num_ranks: int, mini_batch: int) -> list[list[int]]:
    """Which rows verl trains on together: each rank cuts its equal share of the call into its part of a mini-batch."""
    assert len(rows) % num_ranks == 0 and mini_batch % num_ranks == 0
    share, part = len(rows) // num_ranks, mini_batch // num_ranks
    by_rank = [rows[rank * share : (rank + 1) * share] for rank in range(num_ranks)]
    counts = {len(range(0, share, part)) for _ in by_rank}
    assert len(counts) == 1 and share % part == 0, "the ranks run different numbers of steps"
    return [[row for rank in by_rank for row in rank[start : start + part]] for start in range(0, share, part)]


@settings(max_examples=300)
@given(groups, critics, ranks, ranks, st.sampled_from(["group", "prompt"]), randoms)
def test_every_response_trains_one_critic_once_whatever_the_ranks(
    lengths, num_critics, num_ranks, other_ranks, shard, rng
):
    mini_batch = math.lcm(num_ranks, other_ranks)
    rows = [(f"group-{g}", str(s)) for g, group in enumerate(lengths) for s in range(len(group))]
    length_of = {(f"group-{g}", str(s)): length for g, group in enumerate(lengths) for s, length in enumerate(group)}
    rows = rng.sample(rows, len(rows))
    owners = assign_shards(rows, num_critics=num_critics, shard=shard)
    shards = [[row for row, owner in zip(rows, owners, strict=True) if owner == index] for index in range(num_critics)]
    available = padding_needed(map(len, shards), mini_batch)
    trained: Counter = Counter()
    for own in filter(None, shards):
        padding = -len(own) % mini_batch
        assert padding <= available, "the batch has too few padding rows"
        seq_lens = [8 + length_of[row] for row in own] + [128] * padding
        found = [
            optimizer_steps(dealt(len(own), padding, seq_lens, mini_batch, count), count, mini_batch)
            for count in (num_ranks, other_ranks)
        ]
        assert [sorted(step) for step in found[0]] == [sorted(step) for step in found[1]], "the ranks change the steps"
        steps = found[0]
        assert sorted(row for step in steps for row in step) == list(range(len(own) + padding))
        held = [sum(row < len(own) for row in step) for step in steps]
        assert min(held) >= 1, "an optimizer step on padding alone"
        assert max(held) - min(held) <= 1, "padding piles up in some steps"
        trained.update(own[row] for step in steps for row in step if row < len(own))
    assert trained == Counter(rows)


def dealt(responses: int, padding: int, seq_lens: list[int], mini_batch: int, num_ranks: int) -> list[int]:
    """Rows of a training call, each mini-batch balanced over the ranks as verl balances."""
    rows = spread(range(responses), range(responses, responses + padding))
    parts = []
    for step in mini_batches(rows, mini_batch):
        workload = calculate_workload(torch.tensor([seq_lens[row] for row in step])).tolist()
        cut = get_seqlen_balanced_partitions(workload, k_partitions=num_ranks, equal_size=True)
        parts.append([[step[i] for i in part] for part in cut])
    return rank_major(parts)


@st.composite
def batches(draw):
    """Values of M critics on jagged rows with observation tokens; coarse values, so that ties are common."""
    num_critics = draw(critics)
    keys = [f"{index:02}" for index in range(draw(st.integers(1, 8)))]
    seed = draw(st.integers(0, 2**16))
    levels = draw(st.sampled_from([2, 5, 1000]))
    generator = torch.Generator().manual_seed(seed)
    rows = {}
    for key in keys:
        width = draw(st.integers(1, 9))
        values_MT = torch.randint(0, levels, (num_critics, width), generator=generator) / levels
        rows[key] = values_MT, torch.rand(width, generator=generator) < 0.8
    return rows


def select(rows, fraction_mask: float, fraction_filter: float) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What the trainer does with a batch: rows sorted by key, positions joined, the results given back row by row."""
    keys = sorted(rows)
    values_MN = torch.cat([rows[key][0] for key in keys], dim=1)
    is_response_N = torch.cat([rows[key][1] for key in keys])
    _, sigma_N = ensemble_value(values_MN)
    widths = [len(rows[key][1]) for key in keys]
    kept_N = keep_advantage(sigma_N, is_response_N, fraction=fraction_mask)
    entropy_N = keep_entropy(sigma_N, is_response_N, fraction=fraction_filter)
    return dict(zip(keys, zip(kept_N.split(widths), entropy_N.split(widths), strict=True), strict=True))


@given(batches(), st.floats(0, 0.5), st.floats(0, 0.5), randoms)
def test_selections_take_their_share_whatever_the_order_and_the_padding(rows, fraction_mask, fraction_filter, rng):
    found = select(rows, fraction_mask, fraction_filter)
    tokens = sum(int(is_response.sum()) for _, is_response in rows.values())
    sigma = torch.cat([ensemble_value(values)[1][is_response] for values, is_response in rows.values()])
    for index, fraction in ((0, fraction_mask), (1, fraction_filter)):
        dropped = sum(int((~row[index]).sum()) for row in found.values())
        assert dropped == (math.floor(fraction * tokens) if sigma.any() else 0)
        assert all(row[index][~rows[key][1]].all() for key, row in found.items()), "dropped what is no response token"

    some = next(iter(rows.values()))[0]
    padding = {f"pad{i}": (torch.full((len(some), 1), 1e9 * i), torch.zeros(1, dtype=torch.bool)) for i in range(3)}
    shuffled = dict(rng.sample([*rows.items(), *padding.items()], len(rows) + 3))
    again = select(shuffled, fraction_mask, fraction_filter)
    assert all(torch.equal(again[key][index], found[key][index]) for key in found for index in (0, 1))


@given(batches(), randoms)
def test_the_order_of_the_critics_does_not_matter(rows, rng):
    order = rng.sample(range(8), 8)
    permuted = {
        key: (values[[index for index in order if index < len(values)]], mask) for key, (values, mask) in rows.items()
    }
    found, again = select(rows, 0.3, 0.3), select(permuted, 0.3, 0.3)
    assert all(torch.equal(again[key][index], found[key][index]) for key in found for index in (0, 1))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(0, 1000))
def test_joined_is_the_inverse_of_padded(widths, seed):
    offsets = torch.tensor([0, *widths]).cumsum(0)
    field_N = torch.randn(sum(widths), generator=torch.Generator().manual_seed(seed))
    responses = Responses([str(index) for index in range(len(widths))], offsets, {"field": field_N})
    padded_BT = responses.padded(field_N)
    assert len(padded_BT) == len(widths) and padded_BT.shape[1] >= max(widths)
    assert torch.equal(responses.joined(padded_BT), field_N)
    for row, width in enumerate(widths):
        assert torch.equal(padded_BT[row, :width], field_N[offsets[row] : offsets[row] + width])
        assert not padded_BT[row, width:].any()
