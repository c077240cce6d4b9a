"""From groups to optimizer steps, on any numbers: no response is lost, none is used twice, and no rank waits for another.

The parts have their own tests; here they are put together as a training step does, with verl's own balancing and cutting.
"""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from transfer_queue import KVBatchMeta

from asyppo_verl import batch_io
from asyppo_verl.asyppo import assign_shards
from asyppo_verl.batch_io import Responses, session_of
from asyppo_verl.config import AsyPPOConfig
from asyppo_verl.critic_client import CriticClient
from asyppo_verl.critic_worker import CRITIC_ID, RESPONSES, ShuffledResponses

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


class Group:
    """Stands for the critics' worker group, and keeps what each is told to train on."""

    def __init__(self, ranks: int) -> None:
        self.world_size, self.calls, self._collect_info = ranks, [], {}

    def _query_collect_info(self, mesh: str) -> list[bool]:
        return [True] * self.world_size

    def train_mini_batch(self, call: KVBatchMeta) -> SimpleNamespace:
        self.calls.append(call)
        return SimpleNamespace(get=dict)


def training_calls(
    lengths: dict[str, int], shards: list[list[str]], mini_batch: int, ranks: int, micro_batch: int | None
) -> list[KVBatchMeta]:
    """What the driver tells the critics for shards of rows of these lengths."""
    critic = {"ppo_mini_batch_size": mini_batch, "ppo_epochs": 1, "data_loader_seed": 1, "shuffle": False}
    critic |= {"use_dynamic_bsz": micro_batch is None, "ppo_micro_batch_size_per_gpu": micro_batch}
    critic["fsdp"] = {"ulysses_sequence_parallel_size": 1}
    rollout = {"n": 1, "temperature": 1.0}
    config = OmegaConf.create({"critic": critic, "actor_rollout_ref": {"rollout": rollout}})
    padding = [f"pad_{index}_0" for index in range(-len(lengths) % mini_batch)]  # verl's own
    keys = [*lengths, *padding]
    batch = KVBatchMeta(partition_id="train", keys=keys, tags=[{"seq_len": lengths.get(key, 128)} for key in keys])

    def add_fillers(batch: KVBatchMeta, count: int, *_: object) -> KVBatchMeta:
        keys = [f"filler_{index}_0" for index in range(count)]
        return KVBatchMeta(partition_id="train", keys=keys, tags=[{"seq_len": 128}] * count)

    group = Group(ranks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_io, "add_fillers", add_fillers)
        CriticClient(group, config, AsyPPOConfig(num_critics=len(shards)), 0).start_update(batch, shards, ranks)
    return group.calls


@settings(max_examples=200)
@given(
    groups,
    st.integers(2, 8),
    ranks,
    ranks,
    st.integers(1, 12),
    st.sampled_from(["group", "prompt"]),
    st.sampled_from([None, 1, 3]),
    randoms,
)
def test_law_7_every_response_trains_one_critic_once_in_steps_that_ranks_do_not_change(
    sessions, num_critics, num_ranks, other_ranks, mini_batch, shard, micro_batch, rng
):
    lengths = {f"group-{g}_{s}_0": 8 + length for g, group in enumerate(sessions) for s, length in enumerate(group)}
    keys = rng.sample(list(lengths), len(lengths))
    owners = assign_shards([session_of(key) for key in keys], num_critics=num_critics, shard=shard)
    shards = [[key for key, owner in zip(keys, owners, strict=True) if owner == index] for index in range(num_critics)]
    found = {}
    for count in (num_ranks, other_ranks):
        calls = training_calls({key: lengths[key] for key in keys}, shards, mini_batch, count, micro_batch)
        steps_of = {}
        for call in calls:
            told, size = call.extra_info[RESPONSES], call.extra_info["mini_batch_size"]
            steps = optimizer_steps(call.keys, count, size)
            assert size % (count * (micro_batch or 1)) == 0 and len(steps) == len(told)
            for step, of_rank in zip(steps, told, strict=True):
                for rank, responses in enumerate(of_rank):
                    rows = step[rank * size // count : (rank + 1) * size // count]
                    assert [row in lengths for row in rows] == [True] * responses + [False] * (len(rows) - responses)
            held = [sum(of_rank) for of_rank in told]
            assert min(held) >= 1, "an optimizer step on padding alone"
            assert max(held) - min(held) <= 1, "uneven steps"
            steps_of[call.extra_info[CRITIC_ID]] = [sorted(set(step) & set(lengths)) for step in steps]
        assert len({len(steps) for steps in steps_of.values()}) == 1, "critics make different numbers of steps"
        trained = Counter(key for steps in steps_of.values() for step in steps for key in step)
        assert trained == Counter(keys)
        found[count] = steps_of
    assert found[num_ranks] == found[other_ranks], "the ranks change the steps"


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(0, 100))
def test_shuffling_moves_responses_and_leaves_fillers_where_they_are(responses, seed):
    sampler = ShuffledResponses(responses, 5, seed)
    places = [step * 5 + place < step * 5 + responses[step] for step in range(len(responses)) for place in range(5)]
    first, second = list(sampler), list(sampler)
    for rows in (first, second):
        assert sorted(rows) == list(range(len(sampler)))
        assert all(row == place for place, row in enumerate(rows) if not places[place])
    if sum(responses) > 9:
        assert first != second, "every pass draws anew"


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(0, 1000))
def test_joined_is_the_inverse_of_padded(widths, seed):
    offsets = torch.tensor([0, *widths]).cumsum(0)
    field_N = torch.randn(sum(widths), generator=torch.Generator().manual_seed(seed))
    responses = Responses([str(index) for index in range(len(widths))], offsets, {"field": field_N})
    padded_BT = responses.padded(field_N)
    assert padded_BT.shape == (len(widths), max(widths))
    assert torch.equal(responses.joined(padded_BT), field_N)
    for row, width in enumerate(widths):
        assert torch.equal(padded_BT[row, :width], field_N[offsets[row] : offsets[row] + width])
        assert not padded_BT[row, width:].any()
