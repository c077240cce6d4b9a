"""verl's asynchronous trainers: their own step on a real replay buffer and TransferQueue.

Only the rollout and the critics' answers are forced, since the point is which rows a step trains on.
"""

import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transfer_queue as tq
from tensordict import TensorDict
from test_trainer import ForcedCritics, clean, put_rows, transfer_queue  # noqa: F401  (two of them are fixtures)

from asyppo_verl import batch_io
from asyppo_verl.asyppo import assign_shards
from asyppo_verl.critic_worker import CRITIC_ID
from asyppo_verl.preflight import prepare
from asyppo_verl.trainer import TRAINERS

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300), pytest.mark.usefixtures("clean")]

ASYNC = ["colocate_async", "separate_async"]


class ForcedRollout:
    """Stands for verl's agent loops: every prompt it is given is done at once, with the sessions that ``plan`` says.

    A plan is the number of outputs of every session; None is a session that failed, and so fails its prompt.
    """

    def __init__(self, plan: list[list[int | None]], values: dict[str, list[torch.Tensor]]) -> None:
        self.plan, self.values = plan, values
        self.sessions: dict[str, list[int | None]] = {}

    def generate_sequences(self, batch: TensorDict) -> None:
        for uid in list(batch["uid"]):
            sessions = self.plan[len(self.sessions) % len(self.plan)]
            self.sessions[uid] = sessions
            rows = put_rows({uid: [outputs or 0 for outputs in sessions]}, seed=len(self.sessions))
            generator = torch.Generator().manual_seed(len(self.sessions))
            log_probs = []
            for key, tag in zip(rows.keys, rows.tags, strict=True):
                length = tag["response_len"]
                self.values[key] = [torch.randn(length, generator=generator) for _ in range(2)]
                log_probs.append(-torch.rand(length, generator=generator))
            fields = {"rollout_log_probs": torch.nested.as_nested_tensor(log_probs, layout=torch.jagged)}
            tq.kv_batch_put(keys=rows.keys, partition_id="train", fields=TensorDict(fields, batch_size=len(rows)))
            status = "failure" if None in sessions else "finished"
            tq.kv_put(key=uid, partition_id="train", tag={"status": status})


def async_trainer(compose, toy, mode: str, plan: list[list[int | None]], *overrides: str) -> Any:
    """verl's trainer class, constructed as verl does, without workers: it samples, values, masks and trains critics."""
    config = compose(
        f"trainer.v1.trainer_mode={mode}",
        f"data.train_files={toy}/train.parquet",
        f"data.val_files={toy}/test.parquet",
        "data.dataloader_num_workers=0",
        "data.train_batch_size=4",
        "actor_rollout_ref.actor.ppo_mini_batch_size=2",
        "actor_rollout_ref.hybrid_engine=False",
        "actor_rollout_ref.rollout.nnodes=1",
        "actor_rollout_ref.rollout.n_gpus_per_node=1",
        "actor_rollout_ref.rollout.checkpoint_engine.backend=tcp_store",
        "trainer.v1.separate_async.parameter_sync_step=2",
        # No actor in this test: its old probabilities are those of the rollout, and it does not train.
        "algorithm.rollout_correction.bypass_mode=True",
        "trainer.critic_warmup=1000",
        *overrides,
    )
    prepare(config)
    trainer = TRAINERS[config.trainer.v1.trainer_mode](config)
    assert trainer.config.trainer.v1.trainer_mode == mode, "verl compares the mode with its own names"
    trainer._init_tokenizer()
    trainer._init_dataloader()
    trainer.global_steps, trainer.curr_step_profile, trainer.current_mode = 1, False, None
    trainer.actor_rollout_wg = SimpleNamespace(_dispatch_info={"actor": [0]})
    trainer.reward_loop_manager = SimpleNamespace(reward_loop_worker_handles=[])
    trainer.checkpoint_manager = SimpleNamespace(abort_replicas=lambda: None, sleep_replicas=lambda: None)
    trainer.critic_wg = ForcedCritics({})
    trainer.agent_loop_manager = ForcedRollout(plan, trainer.critic_wg.values)
    return trainer


def trained(calls: list[Any], known: dict[str, Any]) -> list[tuple[str, int]]:
    """(row, critic) for every response of the training calls."""
    return [(key, call.extra_info[CRITIC_ID]) for call in calls for key in call.keys if key in known]


# Complete; a session failed; a session gave nothing; a session gave two outputs and one three.
PLAN = [[1, 1, 1, 1], [1, None, 1, 1], [1, 1, 0, 1], [1, 2, 1, 3]]


@pytest.mark.parametrize("mode", ASYNC)
def test_each_local_update_trains_every_response_of_its_prompts_once(compose, toy, mode):
    trainer = async_trainer(compose, toy, mode, PLAN)
    rollout, critics = trainer.agent_loop_manager, trainer.critic_wg
    metrics: dict[str, Any] = {}
    trainer.on_train_begin()
    trainer.on_step_begin()
    batch = trainer.step(metrics, {})

    # Four prompts in all: one update in colocate_async, two in separate_async.
    rows = set(batch_io.response_keys(batch))
    prompts = {batch_io.session_of(key)[0] for key in rows}
    assert len(prompts) == 4
    assert not any(None in rollout.sessions[uid] for uid in prompts), "a prompt with a failed session was sampled"
    updates = {"colocate_async": 1, "separate_async": 2}[mode]
    # Which of the plan's prompts are sampled is up to their ids, which verl draws.
    incomplete = sum(0 in rollout.sessions[uid] for uid in prompts)
    found = metrics["asyppo/incomplete_groups"]
    # verl weighs the updates of a step by their rows.
    assert found == incomplete if updates == 1 else (found > 0) == (incomplete > 0)
    pairs = trained(critics.calls, critics.values)
    assert Counter(key for key, _ in pairs) == Counter(rows)
    owner = dict(
        zip(sorted(rows), assign_shards([*map(batch_io.session_of, sorted(rows))], num_critics=2), strict=True)
    )
    assert dict(pairs) == owner
    assert len(critics.calls) == 2 * updates
    for m in range(2):
        counts = [len(trained([call], critics.values)) for call in critics.calls if call.extra_info[CRITIC_ID] == m]
        assert min(counts) <= metrics[f"asyppo/critic_{m}/responses"] <= max(counts)


@pytest.mark.parametrize("mode", ASYNC)
def test_the_ranking_is_over_the_local_batch(compose, toy, mode):
    """What is masked adds up to floor(0.2 * tokens) of each update, and the logged share is their mean."""
    trainer = async_trainer(compose, toy, mode, [[1, 1, 1, 1]])
    masked, tokens, rows = [], [], []
    compute = trainer._compute_advantage

    def counted(batch, metrics):
        batch = compute(batch, metrics)
        found = batch_io.fetch(batch, "response_mask", "advantages")
        is_response = found["response_mask"].bool()
        masked.append(int((found["advantages"][is_response] == 0).sum()))
        tokens.append(int(is_response.sum()))
        rows.append(len(batch_io.response_keys(batch)))
        return batch

    trainer._compute_advantage = counted
    metrics: dict[str, Any] = {}
    trainer.on_train_begin()
    trainer.on_step_begin()
    trainer.step(metrics, {})
    assert masked == [math.floor(0.2 * count) for count in tokens] and sum(rows) == 16
    share = sum(row * part / count for row, part, count in zip(rows, masked, tokens, strict=True)) / sum(rows)
    assert metrics["asyppo/adv_masked_fraction"] == pytest.approx(share)


@pytest.mark.parametrize("mode", ASYNC)
def test_stale_prompts_are_dropped_before_anything_is_ranked_or_trained(compose, toy, mode):
    trainer = async_trainer(compose, toy, mode, [[1, 1, 1, 1]], "trainer.v1.sampler.max_off_policy_threshold=1")
    rollout, critics = trainer.agent_loop_manager, trainer.critic_wg
    trainer.on_train_begin()
    trainer.on_step_begin()
    trainer.step({}, {})
    submitted_at_1 = set(rollout.sessions)
    critics.calls.clear()
    trainer.global_steps = 2
    trainer.on_step_begin()
    metrics: dict[str, Any] = {}
    trainer.step(metrics, {})
    assert metrics["training/off_policy/evicted_samples"] == 4, "the prompts left over from step 1"
    used = {batch_io.session_of(key)[0] for key, _ in trained(critics.calls, critics.values)}
    assert len(used) == 4 and not used & submitted_at_1


def test_prompts_whose_rewards_are_all_equal_are_dropped_on_request(compose, toy):
    """verl's dynamic sampling (DAPO) works in front of AsyPPO."""
    trainer = async_trainer(
        compose,
        toy,
        "separate_async",
        [[1, 1, 1, 1]],
        "algorithm.filter_groups.enable=True",
        "algorithm.filter_groups.metric=reward",
        "data.train_batch_size=8",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    )
    critics = trainer.critic_wg
    metrics: dict[str, Any] = {}
    trainer.on_train_begin()
    trainer.on_step_begin()
    batch = trainer.step(metrics, {})
    rewards: dict[str, set[float]] = {}
    found = batch_io.fetch(batch, "rm_scores")
    for key, row in zip(found.keys, found["rm_scores"].split(found.offsets.diff().tolist()), strict=True):
        if key in critics.values:
            rewards.setdefault(batch_io.session_of(key)[0], set()).add(float(row.sum()))
    assert len(rewards) == 8 and all(len(values) == 2 for values in rewards.values())
    assert metrics["training/filter_groups/evicted_samples"] > 0, "no prompt of the plan had equal rewards"
