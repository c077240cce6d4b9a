"""Several turns and tools: what the environment wrote never counts, and a session stays with one critic.

Real TransferQueue batches whose response masks have holes go through the real hooks; for the critics' side also through
real critic workers.
"""

import math
from typing import Any

import clusters
import pytest
import ray
import test_critics
import torch
import transfer_queue as tq
from tensordict import TensorDict
from test_trainer import (
    RAGGED,
    ForcedCritics,
    clean,  # noqa: F401  (a fixture)
    force_values,
    put_rows,
    step,
    stored,
    trainer_for,
)
from transfer_queue import KVBatchMeta

from asyppo_verl import batch_io
from asyppo_verl.critic_worker import value_field

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600), pytest.mark.usefixtures("clean")]


@pytest.fixture(scope="module", autouse=True)
def cluster():
    with clusters.started("test_critics", queue=True):
        yield


@pytest.fixture(scope="module")
def critics(cluster, toy):
    """Two mini-critics on one real rank."""
    from conftest import composing, overrides_for

    group = test_critics.start(composing(overrides_for(toy)), 1)
    yield group
    for worker in group.workers:
        ray.kill(worker)


def jagged(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def poison(batch: KVBatchMeta, *fields: str) -> None:
    """Overwrite fields on every position that is not a response token of the model."""
    masks = stored(batch, "response_mask")
    for field in fields:
        rows = stored(batch, field)
        spoiled = [torch.where(masks[key].bool(), rows[key], torch.full_like(rows[key], 1e6)) for key in batch.keys]
        tq.kv_batch_put(
            keys=batch.keys, partition_id="train", fields=TensorDict({field: jagged(spoiled)}, batch_size=len(batch))
        )


def evaluated(trainer: Any, batch: KVBatchMeta) -> tuple[KVBatchMeta, dict]:
    """The hooks before the updates."""
    metrics: dict[str, Any] = {}
    batch = trainer._balance_batch(batch, metrics)
    batch = trainer._compute_values(batch, metrics)
    return trainer._compute_advantage(batch, metrics), metrics


def of_response(batch: KVBatchMeta, field: str) -> dict[str, torch.Tensor]:
    masks, rows = stored(batch, "response_mask"), stored(batch, field)
    return {key: rows[key][masks[key].bool()] for key in batch.keys if masks[key].any()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("critic_lam", [1.0, 0.9])
def test_what_critics_say_of_observations_changes_nothing(compose, critic_lam):
    """Not the ranking, the masks, the advantages or targets of response tokens, nor a metric."""
    outcomes = []
    for spoil in (False, True):
        batch = put_rows(RAGGED)
        masks, values = stored(batch, "response_mask"), force_values(batch, 2)
        assert any((mask == 0).any() for mask in masks.values()), "the batch has no observation token"
        if spoil:
            values = {
                key: [torch.where(masks[key].bool(), v, (-1) ** m * 1e6) for m, v in enumerate(critics)]
                for key, critics in values.items()
            }
        trainer = trainer_for(
            compose,
            "actor_rollout_ref.actor.entropy_coeff=0.1",
            "algorithm.lam=0.95",
            f"+asyppo.critic_lam={critic_lam}",
        )
        batch, metrics = step(trainer, batch, values)
        outcomes.append(
            (
                of_response(batch, "advantages"),
                of_response(batch, "returns"),
                of_response(batch, batch_io.KEEP_ENTROPY),
                metrics,
            )
        )
        kept = stored(batch, batch_io.KEEP_ENTROPY)
        assert all(kept[key].bool()[masks[key] == 0].all() for key in masks), "an observation token was selected"
    (clean_run, spoiled_run) = outcomes
    assert all(equal(a, b) for a, b in zip(clean_run[:3], spoiled_run[:3], strict=True))
    assert clean_run[3] == spoiled_run[3]
    tokens = sum(len(row) for row in clean_run[0].values())
    assert clean_run[3]["asyppo/adv_masked_fraction"] == math.floor(0.2 * tokens) / tokens


def test_critics_learn_nothing_from_observations(compose, critics):
    """Real critics end up with the same bits when targets and old values of observation tokens are absurd."""
    weights, metrics_of = [], []
    for spoil in (False, True):
        critics.reset()
        before = critics.weights()[0]
        batch = put_rows(RAGGED)
        trainer = trainer_for(compose)
        trainer.critic_wg = critics
        batch, _ = evaluated(trainer, batch)
        if spoil:
            poison(batch, "returns", value_field(0), value_field(1))
        metrics: dict[str, Any] = {}
        trainer._update_critic(batch, metrics)
        after = critics.weights()[0]
        assert not any(test_critics.same(a, b) for a, b in zip(before, after, strict=True)), "a critic did not train"
        weights.append(after)
        metrics_of.append({key: value for key, value in metrics.items() if "perf/" not in key})
    assert all(test_critics.same(a, b) for a, b in zip(*weights, strict=True))
    assert metrics_of[0] == metrics_of[1]


def test_a_critic_sees_every_output_of_its_sessions_and_none_of_the_others(compose, critics):
    """Absurd targets in the sessions of critic 1 change critic 1 alone; a session's outputs are all with one critic."""
    found = []
    for spoil in (False, True):
        critics.reset()
        batch = put_rows(RAGGED)
        trainer = trainer_for(compose)
        trainer.critic_wg = critics
        batch, _ = evaluated(trainer, batch)
        first, second = trainer._shards(batch)
        sessions = [{batch_io.session_of(key) for key in shard} for shard in (first, second)]
        assert not sessions[0] & sessions[1] and {("dd", "2")} <= sessions[0] | sessions[1]
        assert len(first) + len(second) == len(batch_io.response_keys(batch))
        if spoil:
            rows = stored(batch, "returns")
            changed = TensorDict({"returns": jagged([rows[key] + 5 for key in second])}, batch_size=len(second))
            tq.kv_batch_put(keys=second, partition_id="train", fields=changed)
        trainer._update_critic(batch, {})
        found.append(critics.weights()[0])
    assert test_critics.same(found[0][0], found[1][0]) and not test_critics.same(found[0][1], found[1][1])


def test_a_response_that_ends_with_an_observation(compose):
    """A session cut off after a tool's answer: the tail is skipped, whatever the critics say of it."""
    batch = put_rows({"aa": [1, 1, 1, 1], "bb": [1, 1, 1, 1]})
    masks = stored(batch, "response_mask")
    cut = [torch.cat([mask[:-1], mask.new_zeros(1)]) for mask in masks.values()]
    for mask in cut:
        mask[0] = 1
    rewards = [torch.arange(1.0, len(mask) + 1) for mask in cut]
    fields = TensorDict(
        {"response_mask": jagged(cut), "loss_mask": jagged(cut), "rm_scores": jagged(rewards)}, batch_size=len(batch)
    )
    tq.kv_batch_put(keys=batch.keys, partition_id="train", fields=fields)
    values = force_values(batch, 2)
    trainer = trainer_for(compose)
    trainer.critic_wg = ForcedCritics(values)
    batch, metrics = evaluated(trainer, batch)
    tokens = int(sum(mask.sum() for mask in cut))
    assert metrics["asyppo/adv_masked_fraction"] == math.floor(0.2 * tokens) / tokens
    returns, masks = stored(batch, "returns"), stored(batch, "response_mask")
    for key, reward in zip(values, rewards, strict=True):
        # gamma = lam = 1: every response token's target is the sum of the rewards at response tokens from there on.
        expected = (reward * masks[key]).flip(0).cumsum(0).flip(0)
        torch.testing.assert_close(returns[key][masks[key].bool()], expected[masks[key].bool()])
