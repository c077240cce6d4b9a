"""Every key that our scripts, benchmarks and planner name is one that verl, or AsyPPO, reads: being in verl's
configuration is not enough, since some of its keys are left from earlier releases."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest
import transfer_queue
import verl
from omegaconf import OmegaConf
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import CriticConfig, FSDPCriticConfig

import asyppo_verl
from recipe.asyppo.plan.settings import Settings

NODES = "actor_rollout_ref|algorithm|critic|data|reward|skip|trainer|transfer_queue"
KEY = re.compile(rf"(?<![\w./-])\+*((?:{NODES})(?:\.(?!py\b)\w+)+)(?=[=\"'])")
HANDED_ON = re.compile(r"engine_kwargs\.vllm\.|override_config\.|reward_kwargs\.")
"""To vLLM, transformers and the reward, whose names these are."""


def sources(package, *patterns: str) -> str:
    """The code of a package, but for its configuration, which names everything."""
    folder = Path(package.__path__[0])
    files = {file for pattern in patterns for file in folder.glob(pattern)}
    return "\n".join(file.read_text() for file in files if "config" not in file.relative_to(folder).parts)


@pytest.fixture(scope="module")
def code() -> str:
    return "".join(sources(package, "**/*.py") for package in (verl, transfer_queue, asyppo_verl))


@pytest.fixture(scope="module")
def read_of_critic() -> set[str]:
    """What verl's V1 trainer, its configuration class and our worker read of the ``critic`` node."""
    v1 = sources(verl, "trainer/ppo/v1/*.py", "trainer/ppo/utils.py", "utils/config.py")
    found = set(re.findall(r"(?:critic_cfg|config\.critic)\.(\w+)", v1))
    for cls in (CriticConfig, FSDPCriticConfig):
        found |= set(re.findall(r"self\.(\w+)", inspect.getsource(cls.__post_init__)))
    return found | set(re.findall(r"\bcritic\.(\w+)", sources(asyppo_verl, "critic_worker.py")))


def named_by_scripts(root: Path) -> set[str]:
    files = [file for pattern in ("recipe/**/*.sh", "recipe/**/*.py", "scripts/*.sh", "benchmarks/*.py")
             for file in root.glob(pattern)]  # fmt: skip
    return {key for file in files for key in KEY.findall(file.read_text())}


def named_by_planner() -> set[str]:
    """In full: the planner leaves out the first name of an actor's or a rollout's key."""
    help_texts = " ".join(field.metadata.get("help", "") for field in dataclasses.fields(Settings))
    keys = re.findall(r"\b[a-z_]+(?:\.[a-z_]+)+", help_texts)
    return {f"actor_rollout_ref.{key}" if key.split(".")[0] in ("actor", "rollout") else key for key in keys}


def test_every_key_is_read(root, compose, code, read_of_critic):
    keys = named_by_scripts(root) | {key for key in named_by_planner() if not key.startswith("asyppo.")}
    assert len(keys) > 80
    config = compose()
    added = {  # read, but not in verl's yaml
        "critic.ppo_infer_max_token_len_per_gpu",
        "actor_rollout_ref.actor.fsdp_config.mixed_precision",
        "actor_rollout_ref.rollout.enable_sleep_mode",
    }
    for key in keys:
        if HANDED_ON.search(key):
            continue
        name = key.split(".")[-1]
        assert re.search(rf"\.{name}\b|[\"']{name}[\"']", code), f"nothing reads {key}"
        if key.startswith("critic."):
            assert key.split(".")[1] in read_of_critic, f"nothing reads {key} of the critic"
        assert key in added or OmegaConf.select(config, key, default="no") != "no", key


@pytest.mark.parametrize("key", ["critic.ulysses_sequence_parallel_size", "critic.rollout_n"])
def test_a_dead_key_is_noticed(key, read_of_critic, compose):
    assert OmegaConf.select(compose(), key) is not None
    assert key.split(".")[1] not in read_of_critic


def test_verls_own_critic_has_the_budget_of_the_recipe(compose):
    """The key that run_qwen3.sh sets for ``ppo`` and ``ppo_small_critic`` is the one with which verl trains."""
    critic = omega_conf_to_dataclass(compose("+critic.ppo_infer_max_token_len_per_gpu=777").critic)
    assert critic.ppo_infer_max_token_len_per_gpu == 777
    trainer = sources(verl, "trainer/ppo/v1/trainer_base.py")
    assert "critic_cfg.engine.max_token_len_per_gpu = critic_cfg.ppo_infer_max_token_len_per_gpu" in trainer
