"""What the recipe's scripts say of memory and time in their headers is what the planner says of what they set."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from test_recipe import ALGORITHMS, EVALUATION_PROBLEMS, SIZES, command_of, environment, validated

PLANNED = {
    # how recipe.asyppo.plan calls a setting of verl
    "num_critics": "asyppo.num_critics",
    "gpus": "trainer.n_gpus_per_node",
    "nodes": "trainer.nnodes",
    "prompts": "data.train_batch_size",
    "responses": "actor_rollout_ref.rollout.n",
    "prompt_length": "data.max_prompt_length",
    "response_length": "data.max_response_length",
    "actor_epochs": "actor_rollout_ref.actor.ppo_epochs",
    "critic_epochs": "critic.ppo_epochs",
    "reference": "actor_rollout_ref.actor.use_kl_loss",
    "actor_tokens": "actor_rollout_ref.actor.ppo_max_token_len_per_gpu",
    "log_prob_tokens": "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu",
    "critic_tokens": "critic.ppo_max_token_len_per_gpu",
    "value_tokens": "critic.forward_max_token_len_per_gpu",
    "entropy_chunking": "actor_rollout_ref.actor.entropy_from_logits_with_chunking",
    "actor_sp": "actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size",
    "critic_sp": "critic.fsdp.ulysses_sequence_parallel_size",
    "actor_fsdp_size": "actor_rollout_ref.actor.fsdp_config.fsdp_size",
    "critic_fsdp_size": "critic.fsdp.fsdp_size",
    "actor_offload": "actor_rollout_ref.actor.fsdp_config.param_offload",
    "critic_offload": "critic.fsdp.param_offload",
    "tensor_parallel": "actor_rollout_ref.rollout.tensor_model_parallel_size",
    "gpu_memory_utilization": "actor_rollout_ref.rollout.gpu_memory_utilization",
    "max_num_seqs": "actor_rollout_ref.rollout.max_num_seqs",
}
HARDWARE = {"80": "h100", "141": "h200"}


def header_of(root: Path, size: str) -> str:
    """The comment that opens a size's script, continued lines joined."""
    text = (root / f"scripts/run_asyppo_qwen3_{size}.sh").read_text().split("set -euo")[0]
    return text.replace("\\\n#", "")


def plan_of_header(root: Path, size: str, gpu_gb: str, *options: str) -> dict:
    """What the header's command for cards of a size prints with ``--json``."""
    (command,) = re.findall(rf"\b{gpu_gb} GB cards: python (-m recipe.asyppo.plan .*)", header_of(root, size))
    words = [sys.executable, *command.split(), "--json", *options]
    return json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("gpu_gb", HARDWARE)
def test_the_memory_plans_fit_and_are_those_of_the_header(root, toy, tmp_path, size, gpu_gb):
    """The header's command plans what the script sets, for the models that it names."""
    env, plan = environment(root, toy, GPU_GB=gpu_gb), plan_of_header(root, size, gpu_gb)
    config = validated(command_of(root, size, tmp_path, env))
    assert {name: plan["settings"][name] for name in PLANNED} == {
        name: OmegaConf.select(config, key) for name, key in PLANNED.items()
    }
    assert plan["settings"]["hardware"] == HARDWARE[gpu_gb]
    lines = command_of(root, size, tmp_path, env | {"ACTOR_MODEL": "", "CRITIC_MODEL": ""})
    for role, key in (("actor", "actor_rollout_ref"), ("critic", "critic")):
        assert f"{key}.model.path=Qwen/{plan['settings'][role]['name']}-Base" in lines

    found = plan["algorithms"]
    assert set(found) == set(ALGORITHMS) and all(algorithm["fits"] for algorithm in found.values())
    peak = max(algorithm["peak_gib"] for algorithm in found.values())
    assert f"{gpu_gb} GB cards: {math.ceil(peak)} GiB" in header_of(root, size)


@pytest.mark.parametrize("size", SIZES)
def test_the_times_of_the_header_are_those_of_its_plans(root, toy, tmp_path, size):
    """Validation is generation of the six evaluation sets: before training, every so often, and after the last step."""
    config = validated(command_of(root, size, tmp_path, environment(root, toy)))
    steps, samples = config.trainer.total_training_steps, config.actor_rollout_ref.rollout.val_kwargs.n
    times = config.trainer.val_before_train + math.ceil(steps / config.trainer.test_freq)
    problems = round(sum(EVALUATION_PROBLEMS.values()), -1)
    training, validation = [], []
    for gpu_gb in HARDWARE:
        plans = plan_of_header(root, size, gpu_gb)["algorithms"]
        training.append([round(steps * sum(plans[a]["seconds_estimate"].values()) / 3600) for a in ("asyppo", "ppo")])
        options = ("--prompts", str(problems), "--responses", str(samples))
        every = plan_of_header(root, size, gpu_gb, *options)["algorithms"]["asyppo"]["seconds_estimate"]
        validation.append(round(times * every["generation"] / 3600))
    assert (
        f"8 H100: {training[0][0]} h, 8 H200: {training[1][0]} h for {steps} steps "
        f"(ALGO=ppo: {training[0][1]} h, {training[1][1]} h), "
        f"and about {validation[0]} h, {validation[1]} h for {times} validations, "
        f"each of {problems:,} problems with {samples} samples"
    ) in " ".join(header_of(root, size).replace("#", "").split())
    assert f"about {problems:,} problems" in (root / "scripts/evaluate.sh").read_text()
