"""The older supported verl: what AsyPPO takes from verl, and gives it, is the same there."""

import os
import subprocess
import sys

import pytest

from asyppo_verl.config import SUPPORTED_VERL

OLDER = SUPPORTED_VERL[0]
CONTRACT = (
    "trainer",
    "plugin::test_other_estimators_get_verls_own_trainer_and_decisions",
    "plugin::test_asyppo_reaching_verls_own_trainer_stops_with_an_explanation",
    "config::test_prepare_points_verl_at_our_trainer",
    "config::test_overrides_of_single_critics",
    "placement::test_the_critics_get_their_gpus_in_every_mode",
    "recipe::test_the_cpu_script_is_a_valid_configuration",
    "recipe::test_the_recipes_yaml_is_a_valid_configuration_with_the_defaults_of_the_plugin",
    "evaluate::test_the_script_is_a_valid_configuration_of_verl",
    "actor_loss::test_law_5_entropy",
    "actor_loss::test_every_policy_loss_of_verl_is_classified",
    "critics::test_every_critic_evaluates_every_response_whatever_the_ranks",
    "critics::test_training_a_critic_changes_only_that_critic",
    "critics::test_values_are_clipped_around_the_critics_own_old_values",
    "critics::test_checkpoints_restore_weights_optimizer_and_schedule[pair]",
    "critics::test_a_critic_on_its_own_share_is_the_critic_that_spans_as_many_ranks",
    "critics::test_the_critics_own_batching_keys_reach_the_engine",
    "export::test_a_critic_of_verl_is_exported_as_a_critic_though_its_configuration_says_causal_model",
)
"""Modules of tests, or one test of them, in which a hook, a call or a format of verl is met."""


def _node(name: str) -> str:
    module, _, test = name.partition("::")
    return f"tests/test_{module}.py" + (f"::{test}" if test else "")


@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_contract(root):
    folder = root / f".venv/verl-{OLDER}"
    assert folder.is_dir(), "bash scripts/install.sh puts it there"
    env = {**os.environ, "PYTHONPATH": str(folder)}
    version = "import importlib.metadata, verl; print(importlib.metadata.version('verl'), verl.__file__)"
    found = subprocess.run([sys.executable, "-c", version], env=env, capture_output=True, text=True, check=True)
    assert found.stdout.split() == [OLDER, str(folder / "verl/__init__.py")], found.stdout
    # Without taking the interpreter down, in which threads of Ray and TransferQueue have crashed after the last test.
    pytests = "import os, sys, pytest; code = pytest.main(sys.argv[1:]); sys.stdout.flush(); os._exit(code)"
    run = subprocess.run(
        [sys.executable, "-c", pytests, "-q", "-m", "not e2e", *map(_node, CONTRACT)],
        cwd=root,
        env=env,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:]
