"""What the checks before Ray accept, what they only point out, and that they know verl as it is."""

import inspect
import logging
import os
import re
import shutil
from pathlib import Path

import httpx
import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from omegaconf import OmegaConf
from test_bad_input import driver

from asyppo_verl.preflight import files, models, prepare
from asyppo_verl.preflight.checkpoints import check_checkpoints, checkpoint_notices
from asyppo_verl.preflight.choices import LOSS_AGG_MODES
from asyppo_verl.preflight.kinds import default_config
from asyppo_verl.preflight.models import ask_hub
from asyppo_verl.resume import Part


def test_the_defaults_that_kinds_are_compared_with_are_verls():
    from hydra import compose, initialize_config_module

    with initialize_config_module("verl.trainer.config", version_base=None):
        composed = OmegaConf.to_container(compose("ppo_trainer"), resolve=True)
    assert {**default_config(), "model_engine": "dp"} == composed


def test_the_loss_aggregations_are_verls():
    from verl.trainer.ppo.core_algos import agg_loss

    loss = torch.ones(1, 1)
    for mode in LOSS_AGG_MODES:
        agg_loss(loss, loss, mode, loss_scale_factor=1)
    with pytest.raises(ValueError):
        agg_loss(loss, loss, "mean")
    assert set(re.findall(r'"((?:token|seq)-[\w-]+)"', inspect.getsource(agg_loss))) == set(LOSS_AGG_MODES)


# -- the method's name ---------------------------------------------------------------------------------------------


def test_another_estimator_is_let_through_with_one_warning(compose, caplog):
    """A shared yaml may hold the asyppo node, wrong or not, while a baseline is run."""
    shared = ("+asyppo.num_critics=-3", "+algorithm.asyppo.num_critics=3", "critic.strategy=fsdp2")
    with caplog.at_level(logging.WARNING):
        driver(compose("algorithm.adv_estimator=gae", *shared))
    assert caplog.text.count("the settings below asyppo are idle with algorithm.adv_estimator=gae") == 1
    caplog.clear()
    driver(compose("algorithm.adv_estimator=gae"))
    assert "asyppo" not in caplog.text


def test_estimators_and_losses_that_only_workers_know_are_left_to_them(compose):
    own = "+ray_kwargs.ray_init.runtime_env.env_vars.VERL_USE_EXTERNAL_MODULES=mine"
    driver(compose("algorithm.adv_estimator=asyppo_two", "critic.enable=True", own))
    prepare(compose("actor_rollout_ref.actor.policy_loss.loss_mode=mine", own))
    prepare(compose("actor_rollout_ref.actor.policy_loss.loss_mode=gspo"))


# -- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override",
    [
        "algorithm.rollout_correction.rollout_is_threshold=0.5_2.0",
        "trainer.v1.sampler.max_off_policy_threshold=null",
        "critic.optim.lr_warmup_steps=null",
        "critic.optim.clip_grad=inf",
        "critic.fsdp.reshard_after_forward=2",
        "critic.profiler=null",
        "trainer.logger=console",
        "trainer.total_training_steps=0",
    ],
)
def test_what_verl_takes_is_accepted(compose, override):
    prepare(compose(override))


def test_every_critic_is_built_by_verl_with_its_own_settings(compose):
    own = ("optim.lr=0.5", "optim.lr_scheduler_type=cosine", "fsdp.param_offload=True")
    prepare(compose(*(f"+asyppo.critic_overrides.1.{setting}" for setting in own)))


# -- checkpoints ---------------------------------------------------------------------------------------------------


def test_a_slash_at_the_end_of_the_resumed_path_is_removed(compose, tmp_path, monkeypatch):
    """verl reads the step with int() from what follows "global_step_"."""
    looked_at: list[tuple[Path, list[Part]]] = []
    monkeypatch.setattr("asyppo_verl.preflight.check_whole", lambda *arguments: looked_at.append(arguments))
    (tmp_path / "global_step_3").mkdir()
    config = compose("trainer.resume_mode=resume_path", f"trainer.resume_from_path={tmp_path}/global_step_3/")
    prepare(config)
    assert config.trainer.resume_from_path == f"{tmp_path}/global_step_3"
    assert [path for path, _ in looked_at] == [tmp_path / "global_step_3"]


def test_a_run_can_start_anew_though_a_path_is_named(compose):
    prepare(compose("trainer.resume_mode=disable", "trainer.resume_from_path=/nowhere/global_step_3"))


def test_checkpoints_without_optimizer_are_pointed_out(compose):
    assert not checkpoint_notices(compose("trainer.save_freq=1"))
    config = compose("trainer.save_freq=1", "critic.checkpoint.save_contents=[model,extra]")
    check_checkpoints(config)
    assert [line.split(":")[0] for line in checkpoint_notices(config)] == [
        "critic.checkpoint.save_contents=['model', 'extra'] lacks 'optimizer'",
        "critic.checkpoint.load_contents=['model', 'extra'] lacks 'optimizer'",
    ]


def test_more_may_be_loaded_than_a_run_that_saves_nothing_would_save(compose):
    check_checkpoints(compose("critic.checkpoint.save_contents=[]", "critic.checkpoint.load_contents=[model]"))


def test_a_folder_that_cannot_be_written_is_refused_if_something_is_saved(compose, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, _mode: Path(path) != tmp_path)
    folder = f"trainer.default_local_dir={tmp_path}/deep/below"
    with pytest.raises(ValueError, match=rf"default_local_dir={tmp_path}/deep/below: {tmp_path} cannot be written"):
        check_checkpoints(compose(folder, "trainer.save_freq=1"))
    check_checkpoints(compose(folder))
    check_checkpoints(compose(folder, "trainer.save_freq=1", "trainer.nnodes=2"))
    assert not list(tmp_path.iterdir()), "nothing is made"


# -- files ---------------------------------------------------------------------------------------------------------


def test_files_need_not_be_on_this_node(compose):
    files.check_paths(compose("trainer.nnodes=2", "data.train_files=/nowhere.parquet"))


def test_an_own_data_set_reads_what_it_likes(compose, tmp_path):
    (tmp_path / "mine.py").write_text("class Mine: ...\n")
    own = (f"data.custom_cls.path={tmp_path}/mine.py", "data.custom_cls.name=Mine")
    files.check_paths(compose(*own, "data.train_files=null"))
    with pytest.raises(ValueError, match=r"data.custom_cls.name='Main' is not in .*; did you mean Mine\?"):
        files.check_paths(compose(*own[:1], "data.custom_cls.name=Main", "data.train_files=null"))


@pytest.mark.parametrize(
    "text",
    [
        "def compute_score(): ...",
        "async def compute_score(): ...",
        "from elsewhere import score as compute_score",
        "from elsewhere import *",
        "compute_score = make()",
        "try:\n    from fast import compute_score\nexcept ImportError:\n    def compute_score(): ...",
    ],
)
def test_a_reward_is_found_however_it_is_defined(compose, toy, tmp_path, text):
    (tmp_path / "reward.py").write_text(text)
    data = [f"data.{name}_files={toy}/train.parquet" for name in ("train", "val")]
    files.check_paths(compose(*data, f"reward.custom_reward_function.path={tmp_path}/reward.py"))


def test_a_function_inside_another_is_no_reward(compose, tmp_path):
    (tmp_path / "reward.py").write_text("def make():\n    def compute_score(): ...\n    return compute_score\n")
    with pytest.raises(ValueError, match="name='compute_score' is not in"):
        files.check_paths(compose(f"reward.custom_reward_function.path={tmp_path}/reward.py"))


# -- the hub -------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """What the hub is asked for; it knows nothing."""
    urls: list[str] = []

    def ask(url: str, timeout: float):
        assert timeout == models.HUB_SECONDS
        urls.append(url)
        raise RepositoryNotFoundError("no", response=httpx.Response(404, request=httpx.Request("HEAD", url)))

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", ask)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return urls


def test_a_hub_that_answers_is_left_to_its_library(asked):
    ask_hub("somebody/some-model")
    assert len(asked) == 1 and asked[0].endswith("/somebody/some-model/resolve/main/config.json")


def test_nothing_is_asked_about_what_is_here(asked, toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(toy / "critic", tmp_path / "models" / "critic")
    cached = tmp_path / "models--somebody--cached"
    (cached / "snapshots" / "1").mkdir(parents=True)
    (cached / "snapshots" / "1" / "config.json").write_text("{}")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in (str(toy / "critic"), "models/critic", "hdfs://somewhere/critic", "/nowhere", "somebody/cached"):
        ask_hub(name)
    monkeypatch.setenv("VERL_USE_MODELSCOPE", "True")
    ask_hub("somebody/elsewhere")
    assert not asked


def test_a_hub_that_does_not_answer_is_an_error_at_once(monkeypatch, asked):
    def silent(*_arguments, **_more):
        raise httpx.ConnectTimeout("timed out")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", silent)
    with pytest.raises(OSError, match="cannot be asked: timed out"):
        ask_hub("somebody/some-model")
