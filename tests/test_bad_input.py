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
from bad_settings import FILES, SETTINGS
from processes import of_session

RAY_STARTS = ("ray init kwargs", "Started a local Ray instance")


def driver(config) -> None:
    """What verl's main function does before it starts Ray."""
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))


@pytest.fixture(scope="session")
def data(toy) -> list[str]:
    return [f"data.train_files={toy}/train.parquet", f"data.val_files={toy}/test.parquet"]


@pytest.fixture(scope="session")
def command(base_overrides, data) -> list[str]:
    """A command line that the driver accepts."""
    return [*base_overrides, *data]


@pytest.fixture
def complete(compose, data, tmp_path) -> Callable:
    """Its configuration, with more overrides."""
    return lambda *more: compose(*data, f"trainer.default_local_dir={tmp_path}/checkpoints", *more)


def test_the_configuration_that_is_spoilt_below_is_accepted(complete):
    driver(complete())


CPU_SECONDS = 15
SECONDS = 20
"""What a refusal may take beyond the import of verl on a busy machine; asking a network again and again takes longer."""


@pytest.fixture(scope="session")
def refusals(command, toy, root, tmp_path_factory) -> dict[str, dict]:
    """What came of verl's command with each line of the table, by its overrides; all in one process that forks."""
    base = tmp_path_factory.mktemp("refusals")
    files = base / "files"
    files.mkdir()
    for name, text in FILES.items():
        (files / name).write_text(text)
    rows = []
    for number, (more, _) in enumerate(SETTINGS):
        for name, folder in (("TOY", toy), ("FILES", files), ("ROOT", root)):
            more = more.replace(name, str(folder))
        folder = base / str(number)
        folder.mkdir()
        rows.append({"folder": str(folder), "arguments": [*command, *more.split()]})
    (base / "rows.json").write_text(json.dumps(rows))
    subprocess.run(
        [sys.executable, Path(__file__).with_name("refusals.py"), base / "rows.json", base / "answers.json"],
        env={**os.environ, "PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        check=True,
    )
    answers = json.loads((base / "answers.json").read_text())
    for row, answer in zip(rows, answers, strict=True):
        answer["made"] = [path.name for path in Path(row["folder"]).iterdir()]
    return {more: answer for (more, _), answer in zip(SETTINGS, answers, strict=True)}


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("overrides", "fragments"), SETTINGS, ids=[overrides for overrides, _ in SETTINGS])
def test_settings_are_refused(refusals, overrides, fragments):
    """One line that says what is wrong, an exit code, little work and no waiting, and nothing left behind."""
    found = refusals[overrides]
    said = [line for line in found["output"].splitlines() if line.startswith("ValueError: ")]
    assert said and all(fragment in said[-1] for fragment in fragments), found["output"]
    assert found["output"].splitlines()[-3:].count(said[-1]) == 1, "something follows the message"
    assert found["code"] == 1
    assert not any(sign in found["output"] for sign in RAY_STARTS)
    assert not found["left"] and set(found["made"]) <= {"outputs"}, "hydra's log folder and nothing else"
    assert found["seconds"] < SECONDS and found["processor"] < CPU_SECONDS


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


# -- a process of its own ------------------------------------------------------------------------------------------

COMMANDS = [
    ("+asyppo.num_critic=3", "did you mean num_critics?"),
    ("critic.model.path=/nowhere/critic", "critic.model.path=/nowhere/critic"),
    ("critic.use_dynamic_bsz=False", "critic.ppo_micro_batch_size_per_gpu=None"),
    ("trainer.resume_mode=resume_path", "trainer.resume_from_path=None"),
]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("module", ["verl.trainer.main_ppo", "recipe.asyppo.main_asyppo"])
@pytest.mark.parametrize(("override", "message"), COMMANDS, ids=[override for override, _ in COMMANDS])
def test_a_refused_command_leaves_nothing_behind(command, tmp_path, module, override, message):
    """Exit code, seconds of work, message at the end; no Ray, no process left, no file but hydra's own."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with subprocess.Popen(
        [sys.executable, "-m", module, *command, override],
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
    assert not any(sign in shown for sign in RAY_STARTS)
    assert not of_session(process.pid)
    assert {path.name for path in tmp_path.iterdir()} <= {"outputs"}, "hydra's log folder and nothing else"


@pytest.mark.parametrize("text", ["", "last"])
def test_a_run_folder_whose_last_checkpoint_is_unknown_is_left_alone(tmp_path, text):
    from recipe.asyppo.console import prepare

    tracker = tmp_path / "run" / "checkpoints" / "latest_checkpointed_iteration.txt"
    tracker.parent.mkdir(parents=True)
    tracker.write_text(text)
    with pytest.raises(SystemExit, match=rf"{tracker} names step '{text}', but .*; write the step of the last whole"):
        prepare(tmp_path / "run", ["trainer.total_training_steps=3"])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
