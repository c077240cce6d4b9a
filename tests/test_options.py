"""verl's options that change what AsyPPO's hooks are given: KL in the reward, rollout correction, sequence parallelism.

docs/options.md lists all options with their tests.
"""

import math
import sys
from typing import Any

import pytest
import ray
import test_critics
import torch
import transfer_queue as tq
from tensordict import TensorDict
from test_multi_turn import cluster, equal, jagged, of_response  # noqa: F401  (the first is a fixture)
from test_trainer import RAGGED, ForcedCritics, clean, force_values, put_rows, stored, trainer_for  # noqa: F401
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.core_algos import compute_gae_advantage_return, get_kl_controller

from asyppo_verl.asyppo import ensemble_value
from asyppo_verl.critic_worker import value_field

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600), pytest.mark.usefixtures("clean")]


def put(batch: KVBatchMeta, **fields: dict[str, torch.Tensor]) -> None:
    """Write fields given as rows by key."""
    data = {name: jagged([rows[key] for key in batch.keys]) for name, rows in fields.items()}
    tq.kv_batch_put(keys=batch.keys, partition_id="train", fields=TensorDict(data, batch_size=len(batch)))


def noise(batch: KVBatchMeta, seed: int) -> dict[str, torch.Tensor]:
    """Log-probabilities for every response position."""
    generator = torch.Generator().manual_seed(seed)
    rows = zip(batch.keys, batch.tags, strict=True)
    return {key: -torch.rand(tag["response_len"], generator=generator) for key, tag in rows}


def run(trainer: Any, batch: KVBatchMeta, values: dict, **fields: dict[str, torch.Tensor]) -> tuple[KVBatchMeta, dict]:
    """The hooks from values to the critics' updates, on a batch that also has ``fields``; its padding rows get zeros."""
    trainer.critic_wg = ForcedCritics(values)
    metrics: dict[str, Any] = {}
    batch = trainer._balance_batch(batch, metrics)
    blank = {key: torch.zeros(tag["response_len"]) for key, tag in zip(batch.keys, batch.tags, strict=True)}
    put(batch, **{name: {**blank, **rows} for name, rows in fields.items()})
    batch = trainer._compute_values(batch, metrics)
    batch = trainer._compute_advantage(batch, metrics)
    return trainer._update_critic(batch, metrics), metrics


@pytest.mark.parametrize("critic_lam", [1.0, 0.9])
def test_kl_in_the_reward_reaches_advantages_and_targets(compose, critic_lam):
    """Both are those of GAE on ``reward - 0.5 * (log pi_old - log pi_ref)``."""
    batch = put_rows(RAGGED)
    values, old, ref = force_values(batch, 2), noise(batch, 1), noise(batch, 2)
    rewards, masks = stored(batch, "rm_scores"), stored(batch, "response_mask")
    trainer = trainer_for(
        compose,
        "algorithm.use_kl_in_reward=True",
        "algorithm.kl_ctrl.kl_coef=0.5",
        "algorithm.lam=0.95",
        f"+asyppo.critic_lam={critic_lam}",
        "+asyppo.adv_mask_fraction=0",
    )
    trainer.kl_ctrl_in_reward = get_kl_controller(trainer.config.algorithm.kl_ctrl)
    batch, metrics = run(trainer, batch, values, old_log_probs=old, ref_log_prob=ref)
    assert metrics["actor/reward_kl_penalty_coeff"] == 0.5
    returns, advantages = of_response(batch, "returns"), stored(batch, "advantages")
    raw = []
    for key, critics in values.items():
        penalised = (rewards[key] - 0.5 * (old[key] - ref[key]) * masks[key])[None]
        value, mask = ensemble_value(torch.stack(critics)[:, None])[0], masks[key][None]
        _, target = compute_gae_advantage_return(penalised.clone(), value, mask, 1.0, critic_lam)
        torch.testing.assert_close(returns[key], target[0][masks[key].bool()], rtol=1e-4, atol=1e-5)
        _, actors = compute_gae_advantage_return(penalised.clone(), value, mask, 1.0, 0.95)
        raw.append((actors - value)[0][masks[key].bool()])
    # The returned advantages are whitened over the batch.
    flat = torch.cat(raw)
    found = torch.cat([advantages[key][masks[key].bool()] for key in values])
    torch.testing.assert_close(found, (flat - flat.mean()) / flat.std(), rtol=1e-3, atol=1e-4)


def test_rejected_tokens_are_neither_ranked_nor_masked_nor_trained_on(compose):
    """Rollout correction by rejection: tokens whose probability changed tenfold leave the response mask."""
    batch = put_rows(RAGGED)
    values, rollout, before = force_values(batch, 2), noise(batch, 1), stored(batch, "response_mask")
    generator = torch.Generator().manual_seed(3)
    rejected = {key: torch.rand(len(row), generator=generator) < 0.3 for key, row in rollout.items()}
    old = {key: rollout[key] + math.log(10) * rejected[key] for key in rollout}
    trainer = trainer_for(
        compose,
        "actor_rollout_ref.actor.entropy_coeff=0.1",
        "algorithm.rollout_correction.rollout_is=token",
        "algorithm.rollout_correction.rollout_rs=token_k1",
        "algorithm.rollout_correction.rollout_rs_threshold='0.5_2.0'",
    )
    batch, metrics = run(trainer, batch, values, old_log_probs=old, rollout_log_probs=rollout)
    kept = {key: before[key].bool() & ~rejected[key] for key in values}
    masks = stored(batch, "response_mask")
    assert all(torch.equal(masks[key].bool(), kept[key]) for key in kept), "verl did not reject as expected"
    tokens, seen = sum(int(row.sum()) for row in kept.values()), sum(int(row.sum()) for row in before.values())
    assert tokens < seen
    assert metrics["asyppo/adv_masked_fraction"] == math.floor(0.2 * tokens) / tokens
    entropy = stored(batch, "asyppo_keep_entropy")
    assert sum(int((~entropy[key].bool()).sum()) for key in kept) == math.floor(0.2 * tokens)
    assert all(entropy[key].bool()[~kept[key]].all() for key in kept), "a rejected token was selected"
    # The weights go on to the actor's loss, the smaller mask to the critics'.
    weights = stored(batch, "rollout_is_weights")
    assert "rollout_is_weights" in batch.fields
    assert all(torch.allclose(weights[key][kept[key]], torch.ones(int(kept[key].sum()))) for key in kept)


def test_bypass_mode_takes_the_rollouts_probabilities(compose):
    batch = put_rows(RAGGED)
    values, rollout = force_values(batch, 2), noise(batch, 1)
    trainer = trainer_for(compose, "algorithm.rollout_correction.bypass_mode=True")
    put(batch, rollout_log_probs=rollout)
    batch = trainer._compute_old_log_prob(batch, {})
    assert equal(stored(batch, "old_log_probs"), rollout)
    tokens = sum(int(mask.sum()) for mask in stored(batch, "response_mask").values())
    trainer.critic_wg = ForcedCritics(values)
    metrics: dict[str, Any] = {}
    batch = trainer._balance_batch(batch, metrics)
    batch = trainer._compute_values(batch, metrics)
    batch = trainer._compute_advantage(batch, metrics)
    assert metrics["asyppo/adv_masked_fraction"] == math.floor(0.2 * tokens) / tokens
    assert {"old_log_probs", "advantages", "response_mask"} <= set(batch.fields)


ATTENTION = "shared_attention"


class SequenceParallelWorker(test_critics.ProbedWorker):
    """The worker on ranks without a GPU: what flash attention computes is computed by torch."""

    def __init__(self, config: Any = None) -> None:
        from transformers.integrations import flash_attention
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
        from verl.models.transformers import monkey_patch

        ALL_ATTENTION_FUNCTIONS.register(ATTENTION, flash_attention.flash_attention_forward)
        ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, flash_attention_mask)
        # verl's own exchange between the ranks stands around this call.
        monkey_patch._flash_attention_forward = attend
        super().__init__(config)


def attend(query, key, value, _mask, _length, *_args, position_ids, softmax_scale, **_kwargs):
    """Causal attention inside each of the packed sequences; (1, tokens, heads, size), as flash attention has it."""
    sequence_T = (position_ids[0] == 0).cumsum(0)
    order_T = torch.arange(len(sequence_T))
    allowed_TT = (sequence_T[:, None] == sequence_T) & (order_T[:, None] >= order_T)
    heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
    found = torch.nn.functional.scaled_dot_product_attention(
        *heads_first, attn_mask=allowed_TT, scale=softmax_scale, enable_gqa=True
    )
    return found.transpose(1, 2).contiguous()


def test_sequence_parallel_critics_are_those_of_one_rank(compose, cluster):  # noqa: F811
    """Two ranks share every sequence: the same values, gradients and weights as one rank with all of it."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    single = test_critics.start(compose, 1)
    shared = test_critics.start(
        compose,
        2,
        "critic.fsdp.ulysses_sequence_parallel_size=2",
        "critic.model.use_remove_padding=True",
        f"critic.model.override_config.attn_implementation={ATTENTION}",
        worker=SequenceParallelWorker,
    )
    data = test_critics.batch(20)
    values = [group.infer_batch(data.copy()).get() for group in (single, shared)]
    for index in range(2):
        a, b = (found[value_field(index)] for found in values)
        assert torch.equal(a.offsets(), b.offsets())
        torch.testing.assert_close(a.values(), b.values(), rtol=1e-4, atol=1e-5)
    norms = [test_critics.train(group, 1, data)["grad_norm"][0] for group in (single, shared)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    first, second = shared.weights()
    assert all(test_critics.same(a, b) for a, b in zip(first, second, strict=True)), "the ranks drifted apart"
    test_critics.assert_close(single.weights()[0][1], first[1])
    for group in (single, shared):
        for worker in group.workers:
            ray.kill(worker)
