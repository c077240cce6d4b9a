"""The plugin from outside: what it changes, what it leaves alone, and that it cannot fail in silence."""

import os
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from asyppo_verl import doctor, hooks

pytestmark = pytest.mark.timeout(300)


def python(code_or_args, **environment: str) -> subprocess.CompletedProcess:
    args = ["-c", code_or_args] if isinstance(code_or_args, str) else code_or_args
    env = {**os.environ, "VERL_PLATFORM": "cpu", **environment}
    return subprocess.run([sys.executable, *args], env=env, capture_output=True, text=True, timeout=240)


def test_importing_verl_loads_the_plugin_and_nothing_heavy():
    modules = {}
    for policy in ("none", "auto"):
        run = python(
            "import sys, verl; print('\\n'.join(sys.modules))", VERL_USE_EXTERNAL_PLUGINS=policy, VERL_PLATFORM=""
        )
        modules[policy] = set(run.stdout.split())
    added = modules["auto"] - modules["none"]
    ours = {name for name in added if not name.startswith("wrapt")}
    assert ours == {"asyppo_verl", "asyppo_verl.plugin", "asyppo_verl.hooks", "asyppo_verl.cpu"}


def test_other_estimators_get_verls_own_trainer_and_decisions():
    from verl.trainer.ppo import core_algos
    from verl.trainer.ppo.utils import need_critic
    from verl.trainer.ppo.v1 import (
        PPOTrainerColocateAsync,
        PPOTrainerSeparateAsync,
        PPOTrainerSync,
        get_trainer_cls,
        register_trainer,
    )

    assert hooks.is_active()
    assert get_trainer_cls("sync") is PPOTrainerSync and PPOTrainerSync.__module__.startswith("verl.")
    assert get_trainer_cls("colocate_async") is PPOTrainerColocateAsync
    assert get_trainer_cls("separate_async") is PPOTrainerSeparateAsync
    for name, enable, wanted in (
        ("gae", None, True),
        ("grpo", None, False),
        ("grpo", True, True),
        ("gae", False, False),
    ):
        config = OmegaConf.create({"algorithm": {"adv_estimator": name}, "critic": {"enable": enable}})
        assert need_critic(config) is wanted
    assert core_algos.get_adv_estimator_fn("gae") is core_algos.compute_gae_advantage_return
    with pytest.raises(ValueError):
        register_trainer("sync")(PPOTrainerColocateAsync)


def test_asyppo_needs_a_critic_whatever_the_critics_own_key_says():
    from verl.trainer.ppo.utils import need_critic

    for enable in (None, True, False):
        config = OmegaConf.create({"algorithm": {"adv_estimator": "asyppo"}, "critic": {"enable": enable}})
        assert need_critic(config) is True


def test_asyppo_reaching_verls_own_trainer_stops_with_an_explanation():
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    with pytest.raises(RuntimeError, match=r"asyppo plugin was not active.*asyppo_verl\.doctor"):
        get_adv_estimator_fn("asyppo")(token_level_rewards=None, response_mask=None, config=None)


@pytest.mark.e2e
def test_an_unknown_verl_is_left_alone_but_does_not_train_asyppo():
    run = python(
        """
import importlib.metadata as metadata
import sys
version = metadata.version
metadata.version = lambda package: "0.10.0" if package == "verl" else version(package)
import verl
from omegaconf import OmegaConf
from verl.trainer.ppo.utils import need_critic
from verl.trainer.ppo.v1 import trainer_base
from verl.utils.config import validate_config
assert not hasattr(need_critic, "__wrapped__") and "asyppo_verl.trainer" not in sys.modules
assert sorted(trainer_base.TRAINER_REGISTRY) == ["colocate_async", "separate_async", "sync"]
validate_config(OmegaConf.create({"algorithm": {"adv_estimator": "asyppo"}}), False, False)
""",
        VERL_PLATFORM="",
    )
    assert run.returncode and "verl==0.10.0 is not supported by asyppo_verl" in run.stderr, run.stderr


@pytest.fixture
def broken_wrapt(tmp_path):
    """A folder that makes the plugin's imports fail."""
    (tmp_path / "wrapt.py").write_text("raise ImportError('wrapt is broken here')\n")
    return str(tmp_path)


@pytest.mark.e2e
def test_a_plugin_that_cannot_load_stops_an_asyppo_run(broken_wrapt):
    run = python(["-m", "verl.trainer.main_ppo", "algorithm.adv_estimator=asyppo"], PYTHONPATH=broken_wrapt)
    assert run.returncode and "plugin could not be loaded (ImportError: wrapt is broken here)" in run.stderr
    assert "Started a local Ray instance" not in run.stdout + run.stderr


@pytest.mark.e2e
def test_a_plugin_that_cannot_load_is_said_but_leaves_other_runs_alone(broken_wrapt):
    run = python(["-c", "import verl; print('alive')", "algorithm.adv_estimator=gae"], PYTHONPATH=broken_wrapt)
    assert run.returncode == 0 and "alive" in run.stdout and "plugin could not be loaded" in run.stderr


@pytest.mark.ray
def test_the_doctor_finds_the_plugin_here_and_in_a_ray_worker():
    run = python(["-m", "asyppo_verl.doctor"])
    assert run.returncode == 0, run.stdout + run.stderr
    assert (
        "in this process: the plugin is active" in run.stdout and "in a Ray worker: the plugin is active" in run.stdout
    )
    assert "verl device    cpu" in run.stdout


@pytest.fixture
def diagnosis(monkeypatch, capsys):
    """The doctor's exit code and output in this process, without Ray."""

    def ask() -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["doctor"])
        monkeypatch.setattr(doctor, "_find_problems_in_ray", lambda: [])
        with pytest.raises(SystemExit) as end:
            doctor.main()
        return int(end.value.code), capsys.readouterr().out

    return ask


def test_the_doctor_answers_what_it_is_without_looking():
    run = python(["-m", "asyppo_verl.doctor", "--help"])
    assert run.returncode == 0 and "Exits with 1 and the fix" in run.stdout and "in this process:" not in run.stdout


def test_the_doctor_names_the_fix(diagnosis, monkeypatch):
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", "none")
    code, shown = diagnosis()
    assert code == 1 and "unset it, or add asyppo to the list" in shown
