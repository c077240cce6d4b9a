"""The older supported verl: the same tests of configuration, recipe, hooks and workers pass on it."""

import os
import subprocess
import sys

import pytest

from asyppo_verl.config import SUPPORTED_VERL

OLDER = SUPPORTED_VERL[0]
MODULES = ("config", "recipe", "plugin", "placement", "actor_loss", "trainer", "critics", "export", "evaluate")


@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_contract(root):
    folder = root / f".venv/verl-{OLDER}"
    assert folder.is_dir(), "bash scripts/install.sh puts it there"
    env = {**os.environ, "PYTHONPATH": str(folder)}
    version = "import importlib.metadata, verl; print(importlib.metadata.version('verl'), verl.__file__)"
    found = subprocess.run([sys.executable, "-c", version], env=env, capture_output=True, text=True, check=True)
    assert found.stdout.split() == [OLDER, str(folder / "verl/__init__.py")], found.stdout
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "not e2e", *(f"tests/test_{name}.py" for name in MODULES)],
        cwd=root,
        env=env,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:]
