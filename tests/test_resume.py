"""A crash costs nothing: killed at any moment, a run goes on from its last complete checkpoint as if nothing had been.

``KILLS=10 pytest tests/test_resume.py -k killed`` adds kills at random moments to those that are chosen.
"""

import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from processes import wait_until_all_are_gone
from replay import Replay, probed, settings
from rollouts import STEPS
from test_bad_input import cut, driver
from test_e2e import check_asyppo, check_weight_sync
from test_parity import assert_same, trained
from training import SMALL

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(3600)]

FILES = ["actor/model", "critic/critic_0/model", "critic/critic_1/optim", "critic/critic_1/extra", "data.pt"]
CHOSEN = ["2:rollout", "3:critic", "5:half critic/critic_1/optim", "6:removal"]
MOMENTS = ["rollout", "critic", "removal", *(f"half {file}" for file in FILES)]
KEEP = ["trainer.max_actor_ckpt_to_keep=1", "trainer.max_critic_ckpt_to_keep=1"]


@pytest.fixture
def short_tmp():
    """A folder for what a killed run leaves in ``TMPDIR``; its path is short, since Ray's sockets live below it."""
    with tempfile.TemporaryDirectory(prefix="k") as folder:
        yield folder


def start(root: Path, task: Path, run_dir: Path, tmp: str, kill: str = "") -> subprocess.Popen:
    """A replay; a run that is to be killed (see :mod:`probe`) in a rollout makes that one."""
    replayed = [step for step in range(1, STEPS + 1) if kill != f"{step}:rollout"]
    given = [*settings(task, STEPS), f"skip.rollout_tq.steps={replayed}".replace(" ", ""), *KEEP]
    process = launch(root, task, run_dir, tmp, *given, **probed(run_dir), PROBE_KILL=kill)
    (run_dir / "probe" / "session").write_text(str(process.pid))
    return process


def launch(root: Path, task: Path, run_dir: Path, tmp: str, *overrides: str, **environment: str) -> subprocess.Popen:
    """The CPU script in a session of its own; what it shows is in the file ``shown``."""
    with open(run_dir / "shown", "w") as shown:
        return subprocess.Popen(
            ["bash", str(root / "scripts/run_asyppo_cpu.sh"), *SMALL, *overrides],
            env={**os.environ, **environment, "RUN_DIR": str(run_dir), "TOY_DIR": str(task), "TMPDIR": tmp},
            stdout=shown,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def last_complete(run_dir: Path) -> int:
    """Step of the checkpoint that the next start resumes from, every file of it read."""
    tracker = run_dir / "checkpoints" / "latest_checkpointed_iteration.txt"
    if not tracker.exists():
        return 0
    step = int(tracker.read_text())
    run = Replay(run_dir)
    for folder in ("actor", "critic/critic_0", "critic/critic_1", "."):
        assert run.state(step, folder), f"step {step}, {folder}"
    return step


def moments() -> list[str]:
    """The chosen kills, and random ones after them if there should be more."""
    more = int(os.environ.get("KILLS", len(CHOSEN))) - len(CHOSEN)
    rng = random.Random(0)
    return CHOSEN[: max(0, len(CHOSEN) + min(0, more))] + [
        f"{step}:{rng.choice(MOMENTS)}" for step in sorted(rng.choices(range(7, STEPS + 1), k=max(0, more)))
    ]


def test_a_killed_run_goes_on_as_if_nothing_had_been(root, task, tmp_path, short_tmp, uninterrupted):
    run_dir, unlogged = tmp_path / "killed", set()
    (run_dir / "probe").mkdir(parents=True)
    for kill in moments():
        step, _, moment = kill.partition(":")
        if last_complete(run_dir) >= int(step):
            continue  # an earlier kill fell after this step, which is not taken again
        process = start(root, task, run_dir, short_tmp, kill)
        process.wait(timeout=600)
        assert process.returncode == -signal.SIGKILL, (run_dir / "shown").read_text()[-3000:]
        wait_until_all_are_gone(process.pid)
        # The checkpoint of a step is complete before older ones are removed, and not before that.
        assert last_complete(run_dir) == int(step) - (moment != "removal"), kill
        if moment == "removal":
            unlogged.add(int(step))  # verl logs a step after its checkpoint
        if moment.startswith("half "):
            (half,) = (run_dir / "checkpoints").glob(f"global_step_{step}/{moment.removeprefix('half ')}*")
            with pytest.raises(RuntimeError, match="zip"):
                torch.load(half, weights_only=False)
    process = start(root, task, run_dir, short_tmp)
    assert process.wait(timeout=600) == 0, (run_dir / "shown").read_text()[-3000:]
    wait_until_all_are_gone(process.pid)

    found = Replay(run_dir)
    logged = sorted({*range(1, STEPS + 1)} - unlogged)
    assert found.metrics() == {step: uninterrupted.metrics()[step] for step in logged}
    for step in logged:
        for field, rows in uninterrupted.step(step)["rows"].items():
            assert_same(found.step(step)["rows"][field], rows, f"step {step}, {field}")
    for folder in ("actor", "critic/critic_0", "critic/critic_1", "."):
        assert_same(
            trained(found, STEPS, folder), trained(uninterrupted, STEPS, folder), f"{folder} after the last step"
        )
    kept = {path.parent.name for path in (run_dir / "checkpoints").glob("global_step_*/actor")}
    kept |= {path.parent.name for path in (run_dir / "checkpoints").glob("global_step_*/critic")}
    assert kept == {f"global_step_{STEPS}"}, "checkpoints of earlier starts stayed"


BROKEN_REWARD = """
from pathlib import Path

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    calls = Path(__file__).with_name("calls")
    with open(calls, "a") as file:
        file.write(".")
    return float("nan") if calls.stat().st_size > 64 else float(len(solution_str) % 2)
"""
"""Not a number from the second step of 64 responses on."""


def test_a_run_that_its_reward_stops_goes_on_when_that_is_mended_until_told_to_end(root, toy, tmp_path, short_tmp):
    """Exit code, message, no process and no file left behind, and no weight moved by the bad batch."""
    run_dir, reward = tmp_path / "run", tmp_path / "reward.py"
    run_dir.mkdir()
    given = ["trainer.total_training_steps=99", "trainer.save_freq=1", f"reward.custom_reward_function.path={reward}"]

    def run() -> tuple[int, str]:
        process = launch(root, toy, run_dir, short_tmp, *given)
        while process.poll() is None and not (run_dir / "checkpoints" / "global_step_3").exists():
            time.sleep(0.5)
        process.terminate()
        code = process.wait(timeout=120)
        wait_until_all_are_gone(process.pid)
        assert not list(Path(short_tmp).iterdir()), "temporary files stayed"
        return code, (run_dir / "shown").read_text()

    reward.write_text(BROKEN_REWARD)
    code, shown = run()
    assert code and "64 of 64 responses of step 2 have rewards that are not finite" in shown[-4000:], shown[-4000:]
    assert last_complete(run_dir) == 1
    assert [path.name for path in (run_dir / "checkpoints").glob("global_step_*")] == ["global_step_1"]
    (before,) = Replay(run_dir).metrics().values()

    reward.write_text(BROKEN_REWARD.replace("> 64", "< 0"))
    code, shown = run()
    assert code == 128 + signal.SIGTERM and "after step 1" in shown and "ended by SIGTERM" in shown, shown[-4000:]
    metrics = Replay(run_dir).metrics()
    assert sorted(metrics)[:2] == [1, 2] and metrics[1] == before
    # vLLM too goes on with the weights of the checkpoint, which are not those that the run began with.
    check_asyppo([metrics[1], metrics[2]])
    check_weight_sync([metrics[1], metrics[2]])


# -- corrupt checkpoints ------------------------------------------------------------------------------------------


@pytest.fixture
def resumable(compose, task, uninterrupted, tmp_path) -> Callable:
    """A configuration that resumes from a copy of the last checkpoint of a real run; the copy may be changed."""
    checkpoints = tmp_path / "checkpoints"
    last = uninterrupted.run_dir / "checkpoints" / f"global_step_{STEPS}"
    shutil.copytree(last, checkpoints / last.name)
    (checkpoints / "latest_checkpointed_iteration.txt").write_text(str(STEPS))

    def composed(*overrides: str):
        return compose(
            f"actor_rollout_ref.model.path={task}/actor",
            f"critic.model.path={task}/critic",
            f"data.train_files={task}/train.parquet",
            f"data.val_files={task}/test.parquet",
            f"trainer.default_local_dir={checkpoints}",
            *overrides,
        )

    return composed


OPTIM = "critic/critic_1/optim_world_size_1_rank_0.pt"
MODEL = "critic/critic_0/model_world_size_1_rank_0.pt"


def tracker_says(text: str) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint.parent / "latest_checkpointed_iteration.txt").write_text(text) and None


SPOILT = [
    ("a critic missing", lambda c: shutil.rmtree(c / "critic/critic_1"), [], ["critic", "missing ['critic_1']"]),
    (
        "all critics missing",
        lambda c: shutil.rmtree(c / "critic"),
        [],
        ["missing ['critic_0', 'critic_1']", "default_local_dir"],
    ),
    (
        "a critic too many",
        lambda c: shutil.copytree(c / "critic/critic_1", c / "critic/critic_2"),
        [],
        ["unexpected ['critic_2']", "num_critics=2"],
    ),
    (
        "more critics wanted",
        lambda c: None,
        ["+asyppo.num_critics=4"],
        ["num_critics=4", "missing ['critic_2', 'critic_3']"],
    ),
    ("one critic wanted", lambda c: None, ["+asyppo.num_critics=1"], ["num_critics=1", "unexpected ['critic_1']"]),
    ("the actor missing", lambda c: shutil.rmtree(c / "actor"), [], ["/actor", "nothing of the kind"]),
    ("an optimizer missing", lambda c: (c / OPTIM).unlink(), [], ["critic_1", "optim_world_size_1_rank_0.pt"]),
    ("an optimizer cut off", lambda c: cut(c / OPTIM), [], [OPTIM, "its end is not there"]),
    ("a model of no size", lambda c: (c / MODEL).write_bytes(b""), [], [MODEL, "its end is not there"]),
    ("the actor cut off", lambda c: cut(c / "actor/model_world_size_1_rank_0.pt"), [], ["/actor/model", "its end"]),
    (
        "a schedule missing",
        lambda c: (c / "critic/critic_0/extra_state_world_size_1_rank_0.pt").unlink(),
        [],
        ["critic_0", "extra_state_world_size_1_rank_0.pt"],
    ),
    (
        "two ranks",
        lambda c: None,
        ["trainer.n_gpus_per_node=2"],
        ["has no model_world_size_2_rank_0.pt", "model_world_size_1"],
    ),
    ("the data position cut off", lambda c: cut(c / "data.pt"), [], ["data.pt", "corrupt"]),
    ("an empty tracker", tracker_says(""), [], ["latest_checkpointed_iteration.txt names step ''", f"[{STEPS}]"]),
    ("a tracker of words", tracker_says("last"), [], ["names step 'last'", "write the step"]),
    ("a tracker of no checkpoint", tracker_says("7"), [], ["names step '7'", f"of the steps [{STEPS}]"]),
]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_checkpoint_that_is_spoilt_below_is_accepted(resumable):
    driver(resumable())


@pytest.mark.parametrize(("spoil", "overrides", "fragments"), [d[1:] for d in SPOILT], ids=[d[0] for d in SPOILT])
def test_a_corrupt_or_foreign_checkpoint_is_refused_and_left_alone(resumable, tmp_path, spoil, overrides, fragments):
    spoil(tmp_path / "checkpoints" / f"global_step_{STEPS}")
    before = content(tmp_path / "checkpoints")
    with pytest.raises(ValueError) as caught:
        driver(resumable(*overrides))
    message = str(caught.value)
    assert all(fragment in message for fragment in fragments) and str(tmp_path) in message, message
    assert "\n" not in message and "trainer.resume_mode=disable" in message
    assert content(tmp_path / "checkpoints") == before


def test_an_earlier_checkpoint_or_none_is_the_fix(resumable, tmp_path):
    checkpoint = tmp_path / "checkpoints" / f"global_step_{STEPS}"
    complete = shutil.copytree(checkpoint, tmp_path / "elsewhere" / checkpoint.name)
    cut(checkpoint / OPTIM)
    driver(resumable("trainer.resume_mode=resume_path", f"trainer.resume_from_path={complete}"))
    driver(resumable("trainer.resume_mode=disable"))
