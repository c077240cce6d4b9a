"""Settings and files that cannot work: each is refused in the driver with one message that names it and says what would do.

``driver`` is the call with which verl's main function starts, so the plugin is met where a user meets it.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
from processes import of_session

SETTINGS = [
    # the knobs
    ("+asyppo.num_critics=-1", ["asyppo.num_critics=-1", "at least 1"]),
    ("+asyppo.num_critics=null", ["asyppo.num_critics=None", "whole number"]),
    ("+asyppo.critic_lam=abc", ["asyppo.critic_lam='abc'", "number"]),
    ("+asyppo.critic_lam=-0.5", ["asyppo.critic_lam=-0.5", "[0, 1]"]),
    ("+asyppo.adv_mask_fraction=nan", ["asyppo.adv_mask_fraction=nan", "[0, 1)"]),
    ("+asyppo.adv_mask_fraction={a:1}", ["asyppo.adv_mask_fraction={'a': 1}", "number"]),
    ("+asyppo.entropy_filter_fraction=inf", ["asyppo.entropy_filter_fraction=inf", "[0, 1)"]),
    ("+asyppo.shard=null", ["asyppo.shard=None", "'group'"]),
    ("+asyppo.shard=[group]", ["asyppo.shard=['group']", "'group'"]),
    ("+asyppo.head_seed=1.5", ["asyppo.head_seed=1.5", "whole number"]),
    ("+asyppo.head_seed=-1", ["asyppo.head_seed=-1", "[0, 2**32)"]),
    ("+asyppo=[1]", ["asyppo=[1]", "+asyppo.num_critics=2"]),
    ("+asyppo.critic_overrides.x.optim.lr=1", ["critic 'x'", "0 to 1"]),
    ("+asyppo.critic_overrides.0.ppo_epochs=2", ["critic_overrides.0.ppo_epochs", "its own model, optim"]),
    ("+asyppo.critic_overrides.0.model=text", ["critic_overrides.0.model='text'", "mapping"]),
    ("+asyppo.critic_overrides.0.optim.lr=abc", ["critic_overrides.0.optim.lr='abc'", "number"]),
    ("algorithm.adv_estimator=AsyPPO", ["algorithm.adv_estimator='AsyPPO'", "spelt asyppo"]),
    ("algorithm.adv_estimator=asy_ppo", ["algorithm.adv_estimator='asy_ppo'", "spelt asyppo"]),
    # numbers of verl that everything else divides by
    ("actor_rollout_ref.rollout.n=0", ["actor_rollout_ref.rollout.n=0", "1 or more"]),
    ("actor_rollout_ref.rollout.n=4.5", ["actor_rollout_ref.rollout.n=4.5", "whole number"]),
    ("critic.ppo_mini_batch_size=0", ["critic.ppo_mini_batch_size=0", "1 or more"]),
    ("critic.ppo_mini_batch_size=null", ["critic.ppo_mini_batch_size=None", "whole number"]),
    ("critic.ppo_mini_batch_size=eight", ["critic.ppo_mini_batch_size='eight'", "whole number"]),
    ("critic.ppo_epochs=0", ["critic.ppo_epochs=0", "1 or more"]),
    ("data.train_batch_size=0", ["data.train_batch_size=0", "1 or more"]),
    ("trainer.nnodes=0", ["trainer.nnodes=0", "1 or more"]),
    ("trainer.n_gpus_per_node=-1", ["trainer.n_gpus_per_node=-1", "1 or more"]),
    ("critic.fsdp.ulysses_sequence_parallel_size=0", ["ulysses_sequence_parallel_size=0", "1 or more"]),
    ("critic.use_dynamic_bsz=False", ["critic.ppo_micro_batch_size_per_gpu=None", "use_dynamic_bsz=True"]),
    (
        "critic.use_dynamic_bsz=False critic.ppo_micro_batch_size_per_gpu=-2",
        ["critic.ppo_micro_batch_size_per_gpu=-2", "1 or more"],
    ),
    (
        "critic.use_dynamic_bsz=False critic.ppo_micro_batch_size_per_gpu=2 critic.forward_micro_batch_size_per_gpu=0",
        ["critic.forward_micro_batch_size_per_gpu=0", "1 or more"],
    ),
    ("critic.ppo_max_token_len_per_gpu=100", ["critic.ppo_max_token_len_per_gpu=100", "raise it to 1024"]),
    ("critic.forward_max_token_len_per_gpu=x", ["critic.forward_max_token_len_per_gpu='x'", "raise it to 1024"]),
    ("critic.optim.lr=null", ["critic.optim.lr=None", "number"]),
    ("critic.cliprange_value=-0.5", ["critic.cliprange_value=-0.5", "above 0"]),
    # paths
    ("critic.model.path=null", ["critic.model.path=None", "Hugging Face format"]),
    ("critic.model.path=/nowhere/critic", ["critic.model.path=/nowhere/critic", "Hugging Face format"]),
    ("critic.model.tokenizer_path=/nowhere", ["critic.model.tokenizer_path=/nowhere", "does not exist"]),
    ("data.train_files=/nowhere.parquet", ["data.train_files=/nowhere.parquet", "does not exist"]),
    ("data.val_files=[/nowhere.parquet]", ["data.val_files=/nowhere.parquet", "does not exist"]),
    (
        "reward.custom_reward_function.path=/nowhere.py",
        ["reward.custom_reward_function.path=/nowhere.py", "does not exist"],
    ),
    # checkpoints
    ("trainer.resume_mode=autto", ["trainer.resume_mode='autto'", "did you mean auto?"]),
    ("trainer.resume_mode=resume_path", ["trainer.resume_from_path=None", "global_step_<n>"]),
    (
        "trainer.resume_mode=resume_path trainer.resume_from_path=/nowhere/global_step_3",
        ["trainer.resume_from_path=/nowhere/global_step_3", "trainer.resume_mode=auto"],
    ),
    ("trainer.default_local_dir=null", ["trainer.default_local_dir=None", "folder for checkpoints"]),
    ("trainer.max_critic_ckpt_to_keep=two", ["trainer.max_critic_ckpt_to_keep='two'", "null to keep all"]),
    ("trainer.max_actor_ckpt_to_keep=0", ["trainer.max_actor_ckpt_to_keep=0", "null to keep all"]),
    ("+trainer.remove_previous_ckpt_in_save=True", ["remove_previous_ckpt_in_save=True", "max_critic_ckpt_to_keep=1"]),
    (
        "critic.checkpoint.load_contents=[model,optimiser]",
        ["critic.checkpoint.load_contents", "'optimiser'", "did you mean optimizer?"],
    ),
    # combinations
    ("trainer.v1.trainer_mode=null", ["trainer.v1.trainer_mode='None'", "sync"]),
    ("critic.strategy=null", ["critic.strategy=None", "fsdp2"]),
]


def driver(config) -> None:
    """What verl's main function does before it starts Ray."""
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))


@pytest.fixture
def complete(compose, toy, tmp_path) -> Callable:
    """A configuration that the driver accepts."""

    def composed(*overrides: str):
        data = [f"data.{name}_files={toy}/{kind}.parquet" for name, kind in (("train", "train"), ("val", "test"))]
        return compose(*data, f"trainer.default_local_dir={tmp_path}/checkpoints", *overrides)

    return composed


def test_the_configuration_that_is_spoilt_below_is_accepted(complete):
    driver(complete())


@pytest.mark.parametrize(("overrides", "fragments"), SETTINGS, ids=[overrides for overrides, _ in SETTINGS])
def test_settings_are_refused(complete, overrides, fragments):
    with pytest.raises(ValueError) as caught:
        driver(complete(*overrides.split()))
    message = str(caught.value)
    assert all(fragment in message for fragment in fragments), message
    assert "\n" not in message and not ray.is_initialized()


# -- damaged files -------------------------------------------------------------------------------------------------


def cut(file: Path) -> None:
    """Leave the first two thirds, as an interrupted copy does."""
    os.truncate(file, file.stat().st_size * 2 // 3)


def lacks_a_shard(folder: Path) -> None:
    index = {
        "metadata": {},
        "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
    }
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


MODELS = [
    ("no configuration", lambda f: (f / "config.json").unlink(), ["no readable model configuration"]),
    ("an empty folder", lambda f: [x.unlink() for x in f.iterdir()], ["no readable model configuration"]),
    ("configuration cut off", lambda f: cut(f / "config.json"), ["no readable model configuration"]),
    (
        "an unknown architecture",
        lambda f: (f / "config.json").write_text('{"model_type": "qwen99"}'),
        ["no readable model configuration", "qwen99"],
    ),
    ("no weights", lambda f: (f / "model.safetensors").unlink(), ["no weights", "copy or download"]),
    ("weights cut off", lambda f: cut(f / "model.safetensors"), ["model.safetensors is damaged", "copy or download"]),
    ("weights of no size", lambda f: (f / "model.safetensors").write_text(""), ["model.safetensors is damaged"]),
    ("a shard missing", lacks_a_shard, ["lacks model-00002-of-00002.safetensors", "copy or download"]),
    ("tokenizer cut off", lambda f: cut(f / "tokenizer.json"), ["tokenizer", "cannot be read"]),
    ("tokenizer of no size", lambda f: (f / "tokenizer.json").write_text(""), ["tokenizer", "cannot be read"]),
]


@pytest.mark.parametrize("key", ["critic.model.path", "actor_rollout_ref.model.path"])
@pytest.mark.parametrize(("damage", "fragments"), [m[1:] for m in MODELS], ids=[m[0] for m in MODELS])
def test_damaged_models_are_refused(complete, toy, tmp_path, key, damage, fragments):
    folder = shutil.copytree(toy / ("critic" if key.startswith("critic") else "actor"), tmp_path / "model")
    damage(folder)
    with pytest.raises(ValueError) as caught:
        driver(complete(f"{key}={folder}"))
    message = str(caught.value)
    assert all(fragment in message for fragment in [f"{key}={folder}", *fragments]), message
    assert "\n" not in message and not ray.is_initialized()


# -- on the command line -------------------------------------------------------------------------------------------

CPU_SECONDS = 15

COMMANDS = [
    ("+asyppo.num_critic=3", "did you mean num_critics?"),
    ("critic.model.path=/nowhere/critic", "critic.model.path=/nowhere/critic"),
    ("critic.use_dynamic_bsz=False", "critic.ppo_micro_batch_size_per_gpu=None"),
    ("trainer.resume_mode=resume_path", "trainer.resume_from_path=None"),
]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("module", ["verl.trainer.main_ppo", "recipe.asyppo.main_asyppo"])
@pytest.mark.parametrize(("override", "message"), COMMANDS, ids=[override for override, _ in COMMANDS])
def test_a_refused_command_leaves_nothing_behind(complete, toy, tmp_path, module, override, message):
    """Exit code, seconds of work, message at the end; no Ray, no process left, no file but hydra's own."""
    config = complete()
    keys = ["actor_rollout_ref.model.path", "actor_rollout_ref.actor.strategy", "critic.model.path", "critic.strategy"]
    given = [f"{key}={_at(config, key)}" for key in [*keys, "data.train_files", "data.val_files"]]
    more = ["algorithm.adv_estimator=asyppo", "actor_rollout_ref.rollout.name=vllm", "actor_rollout_ref.rollout.n=4"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with subprocess.Popen(
        [sys.executable, "-m", module, *given, *more, "actor_rollout_ref.actor.use_dynamic_bsz=True", override],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        shown, _ = process.communicate(timeout=240)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert process.returncode and message in shown[-1000:], shown
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < CPU_SECONDS
    assert "ray init kwargs" not in shown and "Started a local Ray instance" not in shown
    assert not of_session(process.pid)
    assert {path.name for path in tmp_path.iterdir()} <= {"outputs"}, "hydra's log folder and nothing else"


def _at(config, key: str):
    from omegaconf import OmegaConf

    return OmegaConf.select(config, key)


@pytest.mark.parametrize("text", ["", "last"])
def test_a_run_folder_whose_last_checkpoint_is_unknown_is_left_alone(tmp_path, text):
    from recipe.asyppo.console import prepare

    tracker = tmp_path / "run" / "checkpoints" / "latest_checkpointed_iteration.txt"
    tracker.parent.mkdir(parents=True)
    tracker.write_text(text)
    with pytest.raises(SystemExit, match=rf"{tracker} names step '{text}', but .*; write the step of the last whole"):
        prepare(tmp_path / "run", ["trainer.total_training_steps=3"])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
