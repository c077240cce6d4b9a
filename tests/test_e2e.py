"""Whole training runs on the CPU: real verl, Ray, FSDP2 and vLLM, started the way the README says."""

import math
import re

import pytest
from training import train

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


def check_weight_sync(steps: list[dict]) -> None:
    """vLLM samples with the trainer's weights of the same step: in fp32 both give the same probabilities."""
    for step in steps:
        assert step["training/rollout_probs_diff_max"] < 1e-4, "the rollout used stale weights"
    # Otherwise the check above would prove nothing: the updates before the last rollout moved the policy.
    assert max(abs(step["actor/ppo_kl"]) for step in steps[:-1]) > 1e-5
    assert all(step["actor/grad_norm"] > 0 for step in steps)


def check_asyppo(steps: list[dict], num_critics: int = 2) -> None:
    for step in steps:
        tokens = round(
            step["response_length/mean"] * sum(step[f"asyppo/critic_{m}/responses"] for m in range(num_critics))
        )
        assert step["asyppo/adv_masked_fraction"] == pytest.approx(math.floor(0.2 * tokens) / tokens)
        assert step["asyppo/entropy_filtered_fraction"] == step["asyppo/adv_masked_fraction"]
        assert step["asyppo/sigma/mean"] > 0
        assert all(step[f"asyppo/critic_{m}/grad_norm"] > 0 for m in range(num_critics))
        assert all(value is not None and math.isfinite(value) for value in step.values())


def test_one_rank(finished):
    _, steps, shown = finished
    assert len(steps) == 2
    check_asyppo(steps)
    check_weight_sync(steps)
    assert re.search(r"Training Progress: 100%.*2/2", shown)
    assert "reward " in shown and "step time" in shown and "run folder" in shown


def test_every_metric_has_a_row_and_no_row_is_stale(finished, root):
    _, steps, _ = finished
    table = set(re.findall(r"^\| `(asyppo/[^`]*)` \|", (root / "docs/metrics.md").read_text(), re.MULTILINE))
    logged = {re.sub(r"critic_\d+", "critic_<m>", key) for key in steps[-1] if key.startswith("asyppo/")}
    assert logged == table
    assert not [key for key in logged if "min" in key or "max" in key], "verl would reduce these keys with min or max"


def test_the_last_checkpoint_is_kept(finished):
    run_dir, _, _ = finished
    kept = run_dir / "checkpoints" / "global_step_2"
    assert sorted(path.name for path in (kept / "critic").iterdir()) == ["critic_0", "critic_1"]
    assert not list((run_dir / "checkpoints/global_step_1/critic").glob("critic_*/*.pt")), "max_critic_ckpt_to_keep=1"


def test_two_ranks_three_responses_and_another_mode_of_everything(root, toy, tmp_path):
    """Groups that two critics cannot share evenly, padded batches, remove-padding, offload, a larger second critic.

    Started by the explicit entry point, with verl's plugin discovery switched off.
    """
    steps, _ = train(
        root,
        toy,
        tmp_path / "two",
        "trainer.total_training_steps=2",
        "actor_rollout_ref.rollout.n=3",
        "algorithm.lam=0.95",
        "critic.fsdp.param_offload=True",
        "critic.fsdp.optimizer_offload=True",
        "critic.model.use_remove_padding=True",
        f"+asyppo.critic_overrides.1.model.path={toy}/actor",
        "+asyppo.critic_overrides.1.optim.lr=1e-4",
        "+asyppo.critic_overrides.1.use_dynamic_bsz=False",
        "+asyppo.critic_overrides.1.ppo_micro_batch_size_per_gpu=2",
        "trainer.save_freq=-1",
        RANKS="2",
        MAIN="recipe.asyppo.main_asyppo",
        VERL_USE_EXTERNAL_PLUGINS="none",
    )
    assert len(steps) == 2
    check_asyppo(steps)
    check_weight_sync(steps)
    for step in steps:
        assert step["asyppo/critic_0/lr"] == pytest.approx(1e-3) and step["asyppo/critic_1/lr"] == pytest.approx(1e-4)
        assert step["asyppo/critic_0/responses"] + step["asyppo/critic_1/responses"] == 48
