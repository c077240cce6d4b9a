"""Whole runs in verl's other modes: asynchronous trainers, two turns, a reward model, KL terms and what goes with them."""

import math
import re
from pathlib import Path

import pytest
import torch
from training import train
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForSequenceClassification

from asyppo_verl.config import SUPPORTED_VERL, verl_version

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


def check(steps: list[dict], updates: int, ahead: bool) -> None:
    """Metrics of runs whose 16 prompts x 4 responses are trained on in so many updates a step."""
    for step in steps:
        assert sum(step[f"asyppo/critic_{m}/responses"] for m in range(2)) == pytest.approx(64 / updates)
        # Each update masks floor(0.2 * tokens) of its own tokens, fewer than updates/tokens below a fifth of all.
        assert 0.2 - updates / (64 * step["response_length/mean"]) <= step["asyppo/adv_masked_fraction"] <= 0.2
        assert step["asyppo/incomplete_groups"] == 0
        assert step["asyppo/sigma/mean"] > 0 and step["asyppo/critic_correlation"] < 1
        assert all(step[f"asyppo/critic_{m}/grad_norm"] > 0 for m in range(2)) and step["actor/grad_norm"] > 0
        assert all(value is not None and math.isfinite(value) for value in step.values())
        # In model versions; a batch that is generated ahead was begun one version earlier.
        assert step["training/off_policy/trajectory_staleness/min"] >= 0
        assert step["training/off_policy/trajectory_staleness/max"] <= ahead
    assert any(step["training/off_policy/trajectory_staleness/mean"] > 0 for step in steps) == ahead


# The sampler of the CPU script is for the sync trainer.
OWN_SAMPLER = ["trainer.v1.sampler.custom_sampler.path=null", "trainer.v1.sampler.custom_sampler.name=null"]


COLOCATED: list[str] = []
"""The default of ``asyppo.placement``."""
SPLIT = ["+asyppo.placement=split", "+asyppo.pool.n_gpus_per_node=2"]


def test_colocate_async_resumes_elsewhere_with_what_was_being_generated(root, toy, tmp_path):
    """The batch that is generated ahead was already taken from the data: it is in the checkpoint, and trained on.

    Each critic has one rank in both placements, so that the second run can load what the first one saved.
    """
    given = ["trainer.v1.trainer_mode=colocate_async", *OWN_SAMPLER, "trainer.save_freq=2"]
    environment = {"VERL_LOGGING_LEVEL": "INFO"}
    run_dir = tmp_path / "resumed"
    train(root, toy, run_dir, *given, "trainer.total_training_steps=2", *COLOCATED, **environment)
    steps, shown = train(root, toy, run_dir, *given, "trainer.total_training_steps=3", *SPLIT, **environment)
    assert "after step 2" in shown and len(steps) == 3
    log = (run_dir / "log").read_text()
    assert "Loading TransferQueue state from" in log
    if verl_version() == SUPPORTED_VERL[-1]:  # the older one does not say how many
        assert set(re.findall(r"Restored (\d+) training prompt groups", log)) == {"16"}
    check(steps, updates=1, ahead=True)


@pytest.mark.parametrize(
    "placement", [COLOCATED, ["+asyppo.placement=pool", "+asyppo.pool.n_gpus_per_node=1"]], ids=["colocated", "pool"]
)
def test_separate_async_trains(root, toy, tmp_path, placement):
    """The rollout is a process of its own, which gets its weights through a store."""
    steps, _ = train(
        root,
        toy,
        tmp_path / "separate",
        "trainer.v1.trainer_mode=separate_async",
        "trainer.v1.separate_async.parameter_sync_step=2",
        "trainer.v1.separate_async.num_warmup_batches=0",
        *OWN_SAMPLER,
        "actor_rollout_ref.hybrid_engine=False",
        "actor_rollout_ref.rollout.nnodes=1",
        "actor_rollout_ref.rollout.n_gpus_per_node=1",
        "actor_rollout_ref.rollout.checkpoint_engine.backend=tcp_store",
        "actor_rollout_ref.rollout.checkpoint_engine.custom_backend_module=asyppo_verl.cpu.weight_store",
        *placement,
        f"ray_kwargs.ray_init.num_gpus={3 if placement else 2}",
        "trainer.total_training_steps=3",
        "trainer.save_freq=-1",
    )
    assert len(steps) == 3
    check(steps, updates=2, ahead=False)
    for step in steps:
        # Without a batch ahead, the weights that generate are those of the last update of the step before: they arrived.
        # Both updates of a step compare with them, though the first has changed the model in between.
        assert step["training/rollout_probs_diff_max"] < 1e-4 and abs(step["actor/ppo_kl"]) > 1e-6


def test_two_turns_train_under_fsdp1(root, toy, tmp_path):
    """16 prompts x 4 sessions of two turns of 2 tokens, with 3 tokens of the environment between them.

    Actor and critics are under verl's older strategy, with a checkpoint at the end.
    """
    (tmp_path / "loops.yaml").write_text("- name: two_turns\n  _target_: two_turns.TwoTurns\n")
    steps, _ = train(
        root,
        toy,
        tmp_path / "turns",
        f"actor_rollout_ref.rollout.agent.agent_loop_config_path={tmp_path}/loops.yaml",
        "actor_rollout_ref.rollout.agent.default_agent_loop=two_turns",
        "data.max_response_length=8",
        "actor_rollout_ref.actor.strategy=fsdp",
        "critic.strategy=fsdp",
        "trainer.total_training_steps=2",
        "trainer.save_freq=2",
        PYTHONPATH=str(root / "tests"),
    )
    assert len(steps) == 2
    for step_metrics in steps:
        # Half of the 64 sessions are one output of 2 + 3 + 2 tokens, half are two outputs of 2.
        assert [step_metrics[f"asyppo/critic_{m}/responses"] for m in range(2)] == [48, 48]
        assert step_metrics["response_length/mean"] == pytest.approx((32 * 7 + 64 * 2) / 96)
        # 256 tokens are the model's; with the environment's 96 the share would be 70/352.
        assert step_metrics["asyppo/adv_masked_fraction"] == pytest.approx(51 / 256)
        assert step_metrics["asyppo/entropy_filtered_fraction"] == pytest.approx(51 / 256)
        assert step_metrics["asyppo/incomplete_groups"] == 0 and step_metrics["asyppo/sigma/mean"] > 0
        assert all(step_metrics[f"asyppo/critic_{m}/grad_norm"] > 0 for m in range(2))
        assert step_metrics["actor/grad_norm"] > 0
        assert all(value is not None and math.isfinite(value) for value in step_metrics.values())
        # The environment's tokens have no probability of the rollout, and none is compared.
        # The second step's rollout has the weights of the first one's updates, which moved the policy.
        assert step_metrics["training/rollout_probs_diff_max"] < 1e-4
    assert abs(steps[0]["actor/ppo_kl"]) > 1e-6
    saved = {
        path.parent.name for path in (tmp_path / "turns/checkpoints/global_step_2").rglob("model_world_size_1_*.pt")
    }
    assert saved == {"actor", "critic_0", "critic_1"}


def test_a_reward_model_and_other_options_train_together(root, toy, tmp_path):
    """KL terms, correction, offload, the entropy bonus; and scores of a classifier that vLLM serves on the trainer's rank."""
    beta, server = 0.05, "reward.reward_model.rollout"
    make_judge(toy, tmp_path / "judge")
    steps, _ = train(
        root,
        toy,
        tmp_path / "options",
        "reward.custom_reward_function.path=null",
        "reward.reward_model.enable=True",
        f"reward.reward_model.model_path={tmp_path}/judge",
        f"{server}.name=vllm",
        f"{server}.dtype=float32",
        f"{server}.tensor_model_parallel_size=1",
        f"{server}.free_cache_engine=False",
        f"+{server}.enable_sleep_mode=False",
        f"{server}.max_num_seqs=64",
        f"{server}.prompt_length=64",
        f"{server}.response_length=16",
        f"+{server}.engine_kwargs.vllm.distributed_executor_backend=vllm.v1.executor.uniproc_executor.UniProcExecutor",
        "algorithm.use_kl_in_reward=True",
        "algorithm.kl_penalty=low_var_kl",  # never negative, so that few tokens tell
        f"algorithm.kl_ctrl.kl_coef={beta}",
        "actor_rollout_ref.actor.use_kl_loss=True",
        "actor_rollout_ref.actor.kl_loss_coef=0.01",
        "actor_rollout_ref.actor.entropy_coeff=0.01",
        "actor_rollout_ref.actor.fsdp_config.param_offload=True",
        "actor_rollout_ref.actor.fsdp_config.optimizer_offload=True",
        "critic.fsdp.param_offload=True",
        "critic.fsdp.optimizer_offload=True",
        "algorithm.rollout_correction.rollout_is=token",
        "algorithm.lam=0.95",
        "+asyppo.critic_lam=0.9",
        "+asyppo.update_critics_first=True",
        "trainer.total_training_steps=2",
        "trainer.save_freq=-1",
    )
    assert len(steps) == 2
    first, second = steps
    # The reference is the start, in bfloat16: next to no distance before the first update, some after it.
    assert 0 <= first["actor/reward_kl_penalty"] < 1e-3 < second["actor/reward_kl_penalty"]
    assert second["actor/reward_kl_penalty_coeff"] == beta
    assert second["critic/rewards/mean"] < second["critic/score/mean"]
    assert second["actor/kl_loss"] > 1e-4 and second["actor/kl_coef"] == 0.01
    # In float32 the trainer and vLLM give the same probabilities: weights of 1.
    assert second["rollout_corr/rollout_is_mean"] == pytest.approx(1, abs=1e-3)
    for step_metrics in steps:
        # A score of an untrained head is neither 0 nor 1, as a rule's would be, and differs between responses.
        assert step_metrics["critic/score/min"] < step_metrics["critic/score/mean"] < step_metrics["critic/score/max"]
        assert step_metrics["critic/score/mean"] not in (0, 1)
        assert step_metrics["actor/entropy_loss"] > 0
        # 20 % of the tokens, those with the highest sigma, earn no entropy bonus.
        assert step_metrics["actor/entropy_loss"] < step_metrics["actor/entropy"]
        assert 0.19 < step_metrics["asyppo/entropy_filtered_fraction"] <= 0.2
        assert all(step_metrics[f"asyppo/critic_{m}/grad_norm"] > 0 for m in range(2))
        # The values that the advantages are of come from critics that have seen the rewards.
        assert step_metrics["asyppo/explained_var"] < step_metrics["critic/vf_explained_var"]


def make_judge(toy: Path, folder: Path) -> None:
    """A classifier with an untrained head."""
    torch.manual_seed(0)
    config = Qwen3Config.from_pretrained(toy / "critic", num_labels=1, architectures=["Qwen3ForSequenceClassification"])
    Qwen3ForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(toy / "critic").save_pretrained(folder)
