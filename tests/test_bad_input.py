"""Settings and files that cannot work: each is refused in the driver with one message that names it and says what would do.

The plugin is met where a user meets it: in verl's command, or in ``driver``, the call with which its main function starts.
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
from bad_settings import SETTINGS
from processes import of_session


def driver(config) -> None:
    """What verl's main function does before it starts Ray."""
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))


@pytest.fixture(scope="session")
def data(toy) -> list[str]:
    return [f"data.train_files={toy}/train.parquet", f"data.val_files={toy}/test.parquet"]


@pytest.fixture
def complete(compose, data, tmp_path) -> Callable:
    """A configuration that the driver accepts, with more overrides."""
    return lambda *more: compose(*data, f"trainer.default_local_dir={tmp_path}/checkpoints", *more)


def refusal(config) -> str:
    """The one line with which the driver refuses; Ray has not been started."""
    with pytest.raises(ValueError) as caught:
        driver(config)
    message = str(caught.value)
    assert "\n" not in message and not ray.is_initialized()
    return message


@pytest.mark.parametrize(("overrides", "fragments"), SETTINGS, ids=[overrides for overrides, _ in SETTINGS])
def test_refused(complete, toy, tmp_path, overrides, fragments):
    message = refusal(complete(*overrides.replace("TOY", str(toy)).split()))
    assert all(fragment.replace("TOY", str(toy)) in message for fragment in fragments), message
    assert not list(tmp_path.iterdir()), "something was made"


# -- corrupt models ------------------------------------------------------------------------------------------------


def cut(file: Path) -> None:
    """Leave the first two thirds, as an interrupted copy does."""
    os.truncate(file, file.stat().st_size * 2 // 3)


MODELS = [
    ("no configuration", lambda f: (f / "config.json").unlink(), ["verl cannot use"]),
    ("configuration cut off", lambda f: cut(f / "config.json"), ["verl cannot use"]),
    (
        "an unknown architecture",
        lambda f: (f / "config.json").write_text('{"model_type": "qwen99"}'),
        ["verl cannot use", "qwen99"],
    ),
    ("tokenizer cut off", lambda f: cut(f / "tokenizer.json"), ["verl cannot use"]),
]


@pytest.mark.parametrize("key", ["critic.model.path", "actor_rollout_ref.model.path"])
@pytest.mark.parametrize(("spoil", "fragments"), [m[1:] for m in MODELS], ids=[m[0] for m in MODELS])
def test_corrupt_models_are_refused(complete, toy, tmp_path, key, spoil, fragments):
    folder = shutil.copytree(toy / ("critic" if key.startswith("critic") else "actor"), tmp_path / "model")
    spoil(folder)
    message = refusal(complete(f"{key}={folder}"))
    assert all(fragment in message for fragment in [f"{key}={folder}", *fragments]), message


# -- models that do not go together --------------------------------------------------------------------------------


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def critic_copy(toy, tmp_path) -> Path:
    """A changeable copy of the critic's folder."""
    return shutil.copytree(toy / "critic", tmp_path / "critic")


def test_a_critic_without_a_row_for_a_token_is_refused(complete, critic_copy):
    edit(critic_copy / "config.json", vocab_size=100)
    for key in ("critic.model.path", "+asyppo.critic_overrides.1.model.path"):
        message = refusal(complete(f"{key}={critic_copy}"))
        assert f"{key.removeprefix('+')}={critic_copy}" in message and "vocab_size=100 and 259" in message


def test_a_critic_with_another_tokenizer_is_refused(complete, critic_copy, tmp_path):
    text = (critic_copy / "tokenizer.json").read_text()
    for changed in (
        text.replace('"A": ', '"never seen": '),
        text.replace('"A"', '"_"').replace('"B"', '"A"').replace('"_"', '"B"'),
    ):
        folder = shutil.copytree(critic_copy, tmp_path / f"critic{len(list(tmp_path.iterdir()))}")
        (folder / "tokenizer.json").write_text(changed)
        assert "tokenizers with different vocabularies" in refusal(complete(f"critic.model.path={folder}"))


def test_a_vision_language_critic_is_refused(complete, critic_copy):
    from transformers import Qwen2_5_VLConfig

    Qwen2_5_VLConfig(architectures=["Qwen2_5_VLForConditionalGeneration"]).save_pretrained(critic_copy)
    assert "vision-language model; mini-critics read text" in refusal(complete(f"critic.model.path={critic_copy}"))


# -- a process of its own ------------------------------------------------------------------------------------------

RAY_STARTS = ("ray init kwargs", "Started a local Ray instance")
CPU_SECONDS = 15


@pytest.mark.e2e
@pytest.mark.timeout(300)
@pytest.mark.parametrize("module", ["verl.trainer.main_ppo", "recipe.asyppo.main_asyppo"])
def test_a_refused_command_leaves_nothing_behind(base_overrides, data, tmp_path, module):
    """Exit code, seconds of work, message at the end; no Ray, no process left, no file but hydra's own."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with subprocess.Popen(
        [sys.executable, "-m", module, *base_overrides, *data, "critic.model.path=/nowhere/critic"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        shown, _ = process.communicate(timeout=240)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert process.returncode and "critic.model.path=/nowhere/critic" in shown[-1000:], shown
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < CPU_SECONDS
    assert not any(sign in shown for sign in RAY_STARTS)
    assert not of_session(process.pid)
    assert {path.name for path in tmp_path.iterdir()} <= {"outputs"}, "hydra's log folder and nothing else"
