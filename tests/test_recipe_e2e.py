"""The recipe's scripts as a user starts them, with small models: the baselines, two Ray nodes, a job of a cluster."""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from processes import wait_until_all_are_gone
from test_recipe import DEFAULTS, environment

from asyppo_verl.checkpoint import latest_step

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

SMALL = {
    "VERL_PLATFORM": "cpu",
    "PROMPTS": "16",
    "N": "4",
    "MAX_PROMPT": "16",
    "MAX_RESPONSE": "4",
    "N_GPUS": "1",
    "ACTOR_LR": "2e-3",
    "CRITIC_LR": "1e-3",
    "VAL_BEFORE_TRAIN": "False",
    "TEST_FREQ": "-1",
    "SAVE_FREQ": "-1",
    "STEPS": "1",
}


def steps_of(run_dir: Path) -> list[dict]:
    return [json.loads(line)["data"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def run_script(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess:
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-6000:]
    return run


def test_symmetric_ppo_trains_on_prepared_data(root, toy, prepared, tmp_path):
    """Data and reward are the defaults. Random models box no answer, but the critic's values make advantages."""
    env = environment(root, toy, **SMALL, ALGO="ppo", DATA_DIR=str(prepared), RUN_DIR=str(tmp_path / "ppo"))
    env = {key: value for key, value in env.items() if key not in DEFAULTS} | {"MAX_PROMPT": "512"}
    run_script(["bash", str(root / "scripts/run_asyppo_qwen3_14b.sh")], env)
    (step,) = steps_of(tmp_path / "ppo")
    assert not [key for key in step if key.startswith("asyppo/")]
    assert "critic/vf_loss" in step and step["critic/score/max"] == 0 and step["prompt_length/min"] > 100
    assert step["actor/grad_norm"] > 0 and step["training/rollout_probs_diff_max"] < 1e-4


def test_grpo_trains_validates_and_saves(root, toy, tmp_path):
    """The reward is one that random answers get now and then, since equal rewards make no advantages."""
    reward = tmp_path / "reward.py"
    reward.write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None, **_):\n"
        "    score = float(sum(map(ord, solution_str)) % 2)\n"
        "    return {'score': score, 'acc': score, 'pred': solution_str}\n"
    )
    often = {"VAL_BEFORE_TRAIN": "True", "TEST_FREQ": "1", "SAVE_FREQ": "1"}
    env = environment(root, toy, **SMALL | often, ALGO="grpo", RUN_DIR=str(tmp_path / "grpo")) | {"REWARD": str(reward)}
    run_script(["bash", str(root / "scripts/run_asyppo_qwen3_8b.sh"), "data.val_max_samples=32"], env)
    before, step = steps_of(tmp_path / "grpo")
    assert not [key for key in step if key.startswith("asyppo/") or key == "critic/vf_loss"]
    assert step["critic/advantages/max"] > 0 > step["critic/advantages/min"]
    assert step["actor/grad_norm"] > 0.01 and step["training/rollout_probs_diff_max"] < 1e-4
    for metrics in (before, step):
        assert 0 < metrics["val-core/toy_addition/acc/mean@4"] <= metrics["val-core/toy_addition/acc/best@4/mean"] <= 1
    assert latest_step(tmp_path / "grpo/checkpoints") == 1
    saved = tmp_path / "grpo/checkpoints/global_step_1"
    assert (saved / "actor/model_world_size_1_rank_0.pt").is_file() and not (saved / "critic").exists()


SHIMS = {
    # Slurm's commands, for a machine without Slurm: a step on a node is a process here.
    "srun": 'options=(); while [ "${1#--}" != "$1" ]; do options+=("$1"); shift; done\n'
    'echo "${options[*]}" >> "$SRUN_OPTIONS"; exec "$@"',
    "scontrol": 'printf "first\\nsecond\\n"',
}


def test_two_ray_nodes_under_slurm(root, toy, tmp_path):
    """The Slurm script starts two Ray nodes with one rank each, trains AsyPPO across them, and ends them."""
    shims, ray_dir = tmp_path / "bin", Path(tempfile.mkdtemp(prefix="ray-"))
    shims.mkdir()
    for name, body in SHIMS.items():
        (shims / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (shims / name).chmod(0o755)
    env = environment(
        root,
        toy,
        **SMALL,
        PATH=f"{shims}:{os.environ['PATH']}",
        VLLM_CPU_KVCACHE_SPACE="1",
        RAY_TMPDIR=str(ray_dir),
        RAY_PORT=str(free_port()),
        RUN_DIR=str(tmp_path / "nodes"),
        SLURM_JOB_NUM_NODES="2",
        SLURM_JOB_NODELIST="node[1-2]",
        SLURM_CPUS_ON_NODE="32",
        SRUN_OPTIONS=str(tmp_path / "options"),
    )
    try:
        run = run_script(
            ["bash", str(root / "recipe/asyppo/slurm.sh"), str(root / "scripts/run_asyppo_qwen3_4b.sh")], env
        )
        left = [p for p in psutil.process_iter(["cmdline"]) if str(ray_dir) in " ".join(p.info["cmdline"] or [])]
        assert not left, "the Ray cluster outlived the job"
    finally:
        shutil.rmtree(ray_dir, ignore_errors=True)
    assert "2 GPUs on 2 nodes" in run.stdout
    common = "--nodes=1 --ntasks=1 --overlap"
    assert (tmp_path / "options").read_text().splitlines() == [
        f"{common} --nodelist=first",  # asks for its address
        f"{common} --cpu-bind=none --cpus-per-task=32 --nodelist=first",
        f"{common} --cpu-bind=none --cpus-per-task=32 --nodelist=second",
    ]
    requests = re.findall(r"^#SBATCH (.*)", (root / "recipe/asyppo/slurm.sh").read_text(), re.MULTILINE)
    assert {"--exclusive", "--mem=0"} <= set(requests)
    (step,) = steps_of(tmp_path / "nodes")
    assert step["asyppo/critic_0/responses"] + step["asyppo/critic_1/responses"] == 64
    assert step["asyppo/sigma/mean"] > 0 and step["training/rollout_probs_diff_max"] < 1e-4


def test_ray_job_submit(root, toy, tmp_path):
    """The script as a job of a running Ray cluster, which asks for a token; the node's environment names the platform."""
    ray, ray_dir = [sys.executable, "-m", "ray.scripts.scripts"], Path(tempfile.mkdtemp(prefix="ray-"))
    small = {key: value for key, value in SMALL.items() if key != "VERL_PLATFORM"}
    job = environment(root, toy, **small, NNODES="1", RUN_DIR=str(tmp_path / "job"))
    of_job = [f"{key}={value}" for key, value in job.items() if os.environ.get(key) != value]
    node = {
        **os.environ,
        "VERL_PLATFORM": "cpu",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    here, port, dashboard = "127.0.0.1", free_port(), free_port()
    start = ["start", "--head", "--block", "--disable-usage-stats", f"--node-ip-address={here}", f"--port={port}"]
    start += [f"--dashboard-host={here}", f"--dashboard-port={dashboard}"]
    # Jobs are started by the agent, whose usual port another cluster on this machine may have taken.
    start += [f"--dashboard-agent-listen-port={free_port()}", f"--temp-dir={ray_dir}"]
    submit = [*ray, "job", "submit", f"--address=http://{here}:{dashboard}", "--"]
    with subprocess.Popen(
        [*ray, *start, "--num-gpus=1", "--num-cpus=32"],
        env=node,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as head:
        try:
            deadline = time.monotonic() + 60
            while not answers(here, dashboard) and time.monotonic() < deadline:
                time.sleep(0.5)
            run = run_script([*submit, "env", *of_job, "bash", str(root / "scripts/run_asyppo_qwen3_4b.sh")], node)
        finally:
            head.terminate()
            head.wait(60)
            shutil.rmtree(ray_dir, ignore_errors=True)
    assert "succeeded" in run.stdout
    (step,) = steps_of(tmp_path / "job")
    assert step["asyppo/sigma/mean"] > 0 and step["training/rollout_probs_diff_max"] < 1e-4
    wait_until_all_are_gone(head.pid)


def answers(host: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
