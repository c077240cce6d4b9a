"""scripts/accept_gpu.sh with tiny shapes on a CPU: every run is made, killed and resumed, and the verdict is told."""

import json
import os
import subprocess

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


def test_accept_gpu_on_a_cpu(root, toy, tmp_path):
    (tmp_path / "toy").symlink_to(toy)
    run = subprocess.run(
        ["bash", str(root / "scripts/accept_gpu.sh"), str(tmp_path)],
        env={**os.environ, "VERL_PLATFORM": "cpu"},
        capture_output=True,
        text=True,
    )
    report = json.loads(run.stdout.splitlines()[-1])
    checks = report["checks"]
    assert len(checks) == 11, run.stdout + run.stderr[-3000:]
    # Six steps of 128 responses are too few for the reward to rise for certain, or for a critic to be better than a constant.
    may_fail = {name for name in checks if "rises" in name or "learns" in name}
    assert all(checks[name] for name in checks if name not in may_fail), run.stdout
    assert run.returncode == (not all(checks.values()))
    assert report["asyppo"]["phases"]["update_critic"] > 0 == report["grpo"]["phases"]["update_critic"]
    assert report["asyppo_over_grpo"] > 0 and report["planned_peak_gib"]["asyppo"] > report["planned_peak_gib"]["grpo"]
    assert "killed after step 3" in run.stdout.lower() and "go on from step 2" in run.stdout
