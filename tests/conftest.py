"""Shared pieces: a toy task without training, and verl configurations composed as on the command line."""

import copy
import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["VERL_PLATFORM"] = "cpu"
# Processes that tests start go through sets in the same order every time.
os.environ.setdefault("PYTHONHASHSEED", "0")
# Side by side, processes of pytest-xdist have a core each; threads that wait for a core that is taken are slow.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A command in the background of a script ignores Ctrl-C, and so would what it starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import omegaconf.base
import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import settings

# Hundreds of tests resolve the same interpolations of verl's configuration, which omegaconf would parse anew each time.
omegaconf.base.parse = functools.cache(omegaconf.base.parse)

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


TOGETHER = {
    "finished": (
        "test_critic_only",
        "test_e2e.py::test_one_rank",
        "test_e2e.py::test_every_metric",
        "test_e2e.py::test_the_last_checkpoint",
        "test_evaluate",
        "test_placement_e2e",
    ),
    "uninterrupted": (
        "test_parity.py::test_golden_run",
        "test_resume.py::test_a_killed",
        "test_resume.py::test_the_checkpoint",
        "test_resume.py::test_a_corrupt",
        "test_resume.py::test_an_earlier",
    ),
}
"""Fixtures that train, and beginnings of the names of the tests that share one."""
APART = ("test_bad_input", "test_benchmarks", "test_checks", "test_console", "test_e2e", "test_options_e2e")
APART += ("test_plan", "test_plugin", "test_recipe_e2e", "test_resume")
"""Files whose other tests share nothing that is expensive."""
LONG = (*TOGETHER, "test_parity", "test_older_verl", "test_acceptance", "test_laws", "test_critics")


def group_of(nodeid: str) -> str:
    """What one process of pytest-xdist has to itself: the tests of a file, or those that share a training run."""
    name = nodeid.removeprefix("tests/")
    for fixture, beginnings in TOGETHER.items():
        if name.startswith(beginnings):
            return fixture
    return name if name.startswith(APART) else name.partition(".py")[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first; of the others the longest groups, so that no process waits for another one at the end."""

    def rank(item: pytest.Item) -> tuple[bool, int, bool]:
        is_ray, is_e2e = (bool(item.get_closest_marker(mark)) for mark in ("ray", "e2e"))
        group = group_of(item.nodeid)
        return is_ray or is_e2e, LONG.index(group) if group in LONG else len(LONG), is_ray

    items.sort(key=rank)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Deal groups to the processes in this order."""
    from xdist.scheduler import LoadScopeScheduling

    config.option.loadscopereorder = False
    scheduler = LoadScopeScheduling(config, log)
    scheduler._split_scope = group_of
    return scheduler


ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy task with untrained models."""
    from recipe.asyppo.toy.make_toy import make

    folder = tmp_path_factory.mktemp("toy") / "task"
    make(folder, until=0.0, max_steps=1)
    return folder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data folder of the Qwen3 recipe, made from small files: 40 problems to train on, six evaluation sets."""
    import datasets
    from problem_files import HUB, write_sets

    from recipe.asyppo.data.prepare_data import main

    folder = tmp_path_factory.mktemp("prepared")
    write_sets(folder / "source", HUB)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        main(["--source", str(folder / "source"), "--out", str(folder / "data")])
    return folder / "data"


@pytest.fixture(scope="session")
def finished(root: Path, toy: Path, tmp_path_factory: pytest.TempPathFactory):
    """Run folder, metrics and terminal output of a run of two steps on one rank; copy the folder before changing it."""
    from training import replaying, train

    run_dir = tmp_path_factory.mktemp("run") / "one"
    # The first run with these settings records the rollouts that later ones are given.
    recording = replaying(run_dir / "rollouts")
    return run_dir, *train(root, toy, run_dir, "trainer.total_training_steps=2", "trainer.save_freq=1", *recording)


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained models, a critic that has its head, and recorded rollouts: what :mod:`replay` trains on."""
    from replay import make_task

    folder = tmp_path_factory.mktemp("replay") / "task"
    make_task(folder)
    return folder


@pytest.fixture(scope="session")
def uninterrupted(root: Path, task: Path, tmp_path_factory: pytest.TempPathFactory):
    """Ten steps of AsyPPO on recorded rollouts, every checkpoint kept."""
    from replay import replay

    return replay(root, task, tmp_path_factory.mktemp("run") / "uninterrupted")


@pytest.fixture(scope="session")
def base_overrides(toy: Path) -> list[str]:
    """A command line for AsyPPO on the toy task."""
    return overrides_for(toy)


@pytest.fixture
def compose(base_overrides: list[str]) -> Callable:
    """Compose verl's configuration for AsyPPO on the toy task, with overrides."""
    return composing(base_overrides)


def overrides_for(toy: Path) -> list[str]:
    return [
        "algorithm.adv_estimator=asyppo",
        f"actor_rollout_ref.model.path={toy}/actor",
        "actor_rollout_ref.actor.strategy=fsdp2",
        "actor_rollout_ref.actor.ppo_mini_batch_size=8",
        "actor_rollout_ref.actor.use_dynamic_bsz=True",
        "actor_rollout_ref.rollout.name=vllm",
        "actor_rollout_ref.rollout.n=4",
        "critic.strategy=fsdp2",
        f"critic.model.path={toy}/critic",
        "critic.model.use_remove_padding=False",
        "critic.model.enable_gradient_checkpointing=False",
        "+critic.model.override_config.attn_implementation=sdpa",
        "+critic.fsdp.mixed_precision={param_dtype: fp32, reduce_dtype: fp32, buffer_dtype: fp32}",
        "data.train_batch_size=16",
        "trainer.n_gpus_per_node=1",
        "trainer.device=cpu",
        # Logical: any machine can compose a configuration of any size.
        "ray_kwargs.ray_init.num_cpus=999",
    ]


def composing(base_overrides: list[str]) -> Callable:
    """What composes verl's configuration from these overrides and more."""

    @functools.cache
    def base(*groups: str):
        with initialize_config_module("verl.trainer.config", version_base=None):
            return hydra_compose("ppo_trainer", overrides=[*groups, *base_overrides])

    def composed(*more: str):
        groups = [override for override in more if "@" in override or override.startswith("critic=")]
        config = copy.deepcopy(base(*groups))
        values = OverridesParser.create().parse_overrides([override for override in more if override not in groups])
        ConfigLoaderImpl._apply_overrides_to_config(values, config)
        return config

    return composed
