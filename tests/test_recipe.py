"""The recipe's scripts: every one is a valid verl configuration, and the same files train small models here."""

import dataclasses
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir, initialize_config_module
from omegaconf import OmegaConf

from asyppo_verl.config import AsyPPOConfig, is_asyppo
from asyppo_verl.critic_settings import read_config
from asyppo_verl.preflight import prepare
from recipe.asyppo.report.runs import PLACES, flatten

SIZES = ("4b", "8b", "14b")
EVALUATION_PROBLEMS = {"aime24": 30, "aime25": 30, "amc23": 40, "math500": 500, "minerva": 272, "olympiadbench": 674}
ALGORITHMS = {
    # ALGO: (adv_estimator, has a critic, critic as large as the actor)
    "asyppo": ("asyppo", True, False),
    "ppo": ("gae", True, True),
    "ppo_small_critic": ("gae", True, False),
    "grpo": ("grpo", False, False),
}


def environment(root: Path, toy: Path, **variables: str) -> dict[str, str]:
    """What makes a recipe script train the toy task; without VERL_PLATFORM, which a GPU run does not set."""
    outer = {key: value for key, value in os.environ.items() if key != "VERL_PLATFORM"}
    return {
        **outer,
        "ACTOR_MODEL": f"{toy}/actor",
        "CRITIC_MODEL": f"{toy}/critic",
        "TRAIN_FILES": f"{toy}/train.parquet",
        "VAL_FILES": f"{toy}/test.parquet",
        "REWARD": f"{root}/recipe/asyppo/toy/toy_reward.py",
        "PYTHON": f"{root}/.venv/bin/python",
        **variables,
    }


def command_of(root: Path, size: str, tmp_path: Path, env: dict[str, str], *overrides: str) -> list[str]:
    """The overrides with which a size's script starts verl."""
    return recorded(root / f"scripts/run_asyppo_qwen3_{size}.sh", tmp_path, env, *overrides)


def recorded(script: Path, tmp_path: Path, env: dict[str, str], *overrides: str) -> list[str]:
    """The overrides with which a script starts verl, taken from a stand-in for the Python interpreter."""
    recorder, record = tmp_path / "python", tmp_path / "command"
    recorder.write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" > {record}\n')
    recorder.chmod(recorder.stat().st_mode | stat.S_IXUSR)
    subprocess.run(
        ["bash", str(script), *overrides],
        env={**env, "PYTHON": str(recorder), "RUN_DIR": str(tmp_path / "run")},
        check=True,
    )
    words = record.read_text().split("\0")[:-1]
    assert words[:2] == ["-m", "recipe.asyppo.console"] and words[2] == str(tmp_path / "run")
    return words[words.index("verl.trainer.main_ppo") + 1 :]


def validated(overrides: list[str], yaml: Path | None = None):
    """Compose and check a configuration as verl's and our own entry do; an override that does not exist raises."""
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    place = (
        initialize_config_dir(str(yaml.parent), version_base=None)
        if yaml
        else initialize_config_module("verl.trainer.config", version_base=None)
    )
    # Logical: a configuration for eight GPUs is looked at here on a machine without any.
    overrides = [*(line for line in overrides if not line.startswith("hydra.")), "ray_kwargs.ray_init.num_cpus=999"]
    with place:
        config = compose(yaml.stem if yaml else "ppo_trainer", overrides=overrides)
    if is_asyppo(config):
        prepare(config)
    validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
    for node in (config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout, config.critic):
        omega_conf_to_dataclass(node)
    return config


@pytest.mark.parametrize(("gpu_gb", "platform"), [("80", ""), ("141", "cpu")])
@pytest.mark.parametrize("algo", ALGORITHMS)
@pytest.mark.parametrize("size", SIZES)
def test_every_script_is_a_valid_configuration(root, toy, tmp_path, size, algo, gpu_gb, platform):
    env = environment(root, toy, ALGO=algo, GPU_GB=gpu_gb, **({"VERL_PLATFORM": platform} if platform else {}))
    config = validated(command_of(root, size, tmp_path, env, "trainer.nnodes=1"))
    estimator, has_critic, is_symmetric = ALGORITHMS[algo]
    assert config.algorithm.adv_estimator == estimator
    assert config.critic.enable == (True if algo == "asyppo" else None if has_critic else False)
    assert config.critic.model.path == f"{toy}/{'actor' if is_symmetric else 'critic'}"
    assert config.data.train_batch_size * config.actor_rollout_ref.rollout.n == 1024
    assert config.trainer.device == (platform or "cuda")


def test_the_report_knows_which_settings_say_where_a_run_lies(root, toy, tmp_path):
    """Runs of two seeds are one band, whatever their folders."""
    config = validated(command_of(root, "4b", tmp_path, environment(root, toy)))
    settings = flatten(OmegaConf.to_container(config, resolve=False))
    assert {key for key, value in settings.items() if str(tmp_path / "run") in str(value)} <= PLACES


@pytest.mark.parametrize("size", SIZES)
def test_the_algorithms_differ_in_nothing_but_their_critics(root, toy, tmp_path, size):
    def settings(algo: str) -> set[str]:
        folder = tmp_path / algo
        folder.mkdir()
        lines = command_of(root, size, folder, environment(root, toy, ALGO=algo))
        return {line.replace(str(folder), "") for line in lines}

    commands = {algo: settings(algo) for algo in ALGORITHMS}
    shared = set.intersection(*commands.values())
    for algo, lines in commands.items():
        own = {line.lstrip("+").split("=")[0] for line in lines - shared}
        assert own <= {"algorithm.adv_estimator", "critic.model.path", "critic.enable", "asyppo.num_critics", *SPEED}, (
            algo
        )


SPEED = {
    "critic.ppo_infer_max_token_len_per_gpu",  # of verl's own critic
    "asyppo.compile_critics",
    "critic.model.override_config.attn_implementation",
}


@pytest.mark.parametrize("algo", ["asyppo", "ppo", "ppo_small_critic"])
def test_the_critics_tokens_and_the_rollouts_length_are_those_of_the_variables(root, toy, tmp_path, algo):
    env = environment(root, toy, ALGO=algo, CRITIC_TOKENS="12345", MAX_PROMPT="100", MAX_RESPONSE="200")
    config = validated(command_of(root, "4b", tmp_path, env))
    read = (
        ["ppo_max_token_len_per_gpu", "forward_max_token_len_per_gpu"]
        if algo == "asyppo"
        else ["ppo_infer_max_token_len_per_gpu"]
    )
    assert [config.critic[key] for key in read] == [12345] * len(read)
    assert config.actor_rollout_ref.rollout.max_model_len == 300
    overridden = validated(command_of(root, "4b", tmp_path, env, "++data.max_response_length=250"))
    assert overridden.actor_rollout_ref.rollout.max_model_len == 350


@pytest.mark.parametrize(
    ("variables", "compiles"), [("", True), ("CRITIC_SP=2", False), ("CRITIC_SP=2 COMPILE_CRITICS=True", True)]
)
def test_critics_are_not_compiled_under_sequence_parallelism_unless_asked(root, toy, tmp_path, variables, compiles):
    env = environment(root, toy, **dict(pair.split("=") for pair in variables.split()))
    assert f"+asyppo.compile_critics={compiles}" in command_of(root, "4b", tmp_path, env)


@pytest.mark.parametrize(("nodes", "fsdp_size"), [("1", -1), ("2", 8)])
@pytest.mark.parametrize("size", SIZES)
def test_a_critic_is_sharded_inside_a_node(root, toy, tmp_path, size, nodes, fsdp_size):
    env = environment(root, toy, NNODES=nodes, N_GPUS="8")
    config = validated(command_of(root, size, tmp_path, env))
    assert (config.trainer.nnodes, config.trainer.n_gpus_per_node) == (int(nodes), 8)
    assert config.critic.fsdp.fsdp_size == fsdp_size and config.actor_rollout_ref.actor.fsdp_config.fsdp_size == -1


DEFAULTS = ("TRAIN_FILES", "VAL_FILES", "REWARD")


@pytest.mark.parametrize("size", SIZES)
def test_data_and_reward_are_the_prepared_ones_by_default(root, toy, prepared, tmp_path, size):
    env = environment(root, toy, DATA_DIR=str(prepared))
    config = validated(command_of(root, size, tmp_path, {key: env[key] for key in env if key not in DEFAULTS}))
    assert config.data.train_files == [f"{prepared}/train/deepmath.parquet"]
    assert config.data.val_files == [f"{prepared}/eval/{name}.parquet" for name in sorted(EVALUATION_PROBLEMS)]
    reward = config.reward.custom_reward_function
    assert (reward.path, reward.name) == (f"{root}/recipe/asyppo/reward/math_reward.py", "compute_score")
    assert all(Path(file).is_file() for file in (*config.data.train_files, *config.data.val_files, reward.path))


def test_relative_names_are_those_of_the_caller(root, toy, tmp_path, monkeypatch):
    """What is there is found from any folder; a link keeps its name, and what is not there may be a name on the hub."""
    monkeypatch.chdir(toy)
    (tmp_path / "linked.parquet").symlink_to(toy / "test.parquet")
    env = environment(
        root,
        toy,
        ACTOR_MODEL="actor",
        CRITIC_MODEL="Qwen/Qwen3-0.6B-Base",
        TRAIN_FILES="train.parquet,./test.parquet",
        VAL_FILES=os.path.relpath(tmp_path / "linked.parquet"),
        REWARD=os.path.relpath(root / "recipe/asyppo/toy/toy_reward.py"),
        DATA_DIR="no/such/folder",
    )
    lines = command_of(root, "4b", tmp_path, env)
    assert {
        f"actor_rollout_ref.model.path={toy}/actor",
        "critic.model.path=Qwen/Qwen3-0.6B-Base",
        f"data.train_files=[{toy}/train.parquet,{toy}/test.parquet]",
        f"data.val_files=[{tmp_path}/linked.parquet]",
        f"reward.custom_reward_function.path={root}/recipe/asyppo/toy/toy_reward.py",
    } <= set(lines)


PATHS = ("RUN_DIR", "DATA_DIR", "TRAIN_FILES", "VAL_FILES", "REWARD", "ACTOR_MODEL", "CRITIC_MODEL")


@pytest.mark.parametrize("variable", PATHS)
def test_a_name_that_hydra_cannot_read_is_refused(root, toy, tmp_path, variable):
    run = subprocess.run(
        ["bash", str(root / "scripts/run_asyppo_qwen3_4b.sh")],
        env=environment(root, toy) | {"RUN_DIR": str(tmp_path / "run"), variable: "/some/lr=1e-6 [é]/here"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr == (
        f"{variable}=/some/lr=1e-6 [é]/here: hydra does not take these characters in a name: =[é]; "
        "choose a name without them\n"
    )


def test_a_name_that_is_not_refused_is_read_as_it_is(root, toy, tmp_path):
    """Every printable character of ASCII but those that the message above is for."""
    name = "/x" + "".join(map(chr, range(32, 127))).translate(dict.fromkeys(map(ord, "!\"#$&'(),;<=>[\\]^`{}~"))) + "x"
    env = environment(root, toy) | dict.fromkeys(("ACTOR_MODEL", "CRITIC_MODEL", "REWARD"), name)
    env |= {"TRAIN_FILES": f"{name},{name}", "VAL_FILES": name}
    lines = [line for line in command_of(root, "4b", tmp_path, env) if not line.startswith("hydra.")]
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=lines)
    assert config.actor_rollout_ref.model.path == config.critic.model.path == name
    assert config.reward.custom_reward_function.path == name
    assert (config.data.train_files, config.data.val_files) == ([name, name], [name])


def test_an_override_that_does_not_exist_is_refused(root, toy, tmp_path):
    with pytest.raises(Exception, match="no_such_key"):
        validated(command_of(root, "4b", tmp_path, environment(root, toy), "critic.no_such_key=1"))


def test_the_cpu_script_is_a_valid_configuration(root, toy, tmp_path):
    lines = recorded(root / "scripts/run_asyppo_cpu.sh", tmp_path, {**environment(root, toy), "TOY_DIR": str(toy)})
    assert validated(lines).algorithm.adv_estimator == "asyppo"


def test_the_recipes_yaml_is_a_valid_configuration_with_the_defaults_of_the_plugin(root, toy):
    lines = [f"actor_rollout_ref.model.path={toy}/actor", f"critic.model.path={toy}/critic"]
    lines += [f"data.train_files={toy}/train.parquet", f"data.val_files={toy}/test.parquet"]
    lines += [
        "actor_rollout_ref.rollout.name=vllm",
        "actor_rollout_ref.rollout.n=4",
        "actor_rollout_ref.actor.use_dynamic_bsz=True",
    ]
    lines += [f"{role}.strategy=fsdp2" for role in ("actor_rollout_ref.actor", "critic")]
    config = validated(lines, root / "recipe/asyppo/config/asyppo_trainer.yaml")
    assert read_config(config) == AsyPPOConfig()
    assert list(config.asyppo) == [field.name for field in dataclasses.fields(AsyPPOConfig)]


def test_the_recipe_folder_stands_on_its_own(root, toy, tmp_path):
    """In verl's repository recipes lie in verl/recipe; the folder needs nothing else of this one but the plugin."""
    recipe = tmp_path / "verl/recipe/asyppo"
    shutil.copytree(root / "recipe/asyppo", recipe)
    lines = recorded(recipe / "run_qwen3.sh", tmp_path, environment(root, toy))
    assert f"reward.custom_reward_function.path={root}/recipe/asyppo/toy/toy_reward.py" in lines
    assert validated(lines).algorithm.adv_estimator == "asyppo"


def test_an_unknown_algorithm_is_refused(root, toy):
    run = subprocess.run(
        ["bash", str(root / "scripts/run_asyppo_qwen3_4b.sh")],
        env=environment(root, toy, ALGO="pppo"),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2 and "ALGO=pppo is unknown; set asyppo, ppo, ppo_small_critic or grpo" in run.stderr
