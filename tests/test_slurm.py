"""The Slurm script with stand-ins for Slurm's commands, hostname and Ray; a real cluster is in ``test_recipe_e2e``."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

STANDINS = {
    # A step on a node is a process here.
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
    "scontrol": 'printf "first\\nsecond\\n"',
    "hostname": 'case $1 in --ip-address) echo "$NAMES" ;; --all-ip-addresses) echo "$INTERFACES" ;; esac',
    # Python, which starts Ray's nodes, asks how they are and waits for them.
    "python": "trap 'kill $!; echo cluster >> \"$RECORD\"; exit' TERM\n"
    'echo "$*" >> "$RECORD"\n'
    'case $* in *AuthenticationError*) exit "${NO_TOKENS:-0}" ;;\n'
    "*block*) sleep 60 & wait ;; esac",
    # It waits until both nodes have been started.
    "script.sh": 'until [ "$(grep -c block "$RECORD")" = 2 ]; do sleep 0.01; done\n'
    'echo "$* with $RAY_ADDRESS $RAY_AUTH_MODE" >> "$RECORD"',
}


@pytest.fixture
def slurm(root, tmp_path):
    """Start the script; returns its process, and reads what Python and the training script were called with."""
    for name, body in STANDINS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    record = tmp_path / "record"
    record.touch()

    def start(*arguments: str, **variables: str) -> tuple[subprocess.Popen, Path]:
        env = {
            **os.environ,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "PYTHON": str(tmp_path / "python"),
            "RECORD": str(record),
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "NAMES": "10.1.2.3",
            "INTERFACES": "",
            **variables,
        }
        command = ["bash", str(root / "recipe/asyppo/slurm.sh"), *arguments]
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True), record

    return start


@pytest.mark.parametrize(
    ("names", "interfaces", "address"),
    [
        ("10.1.2.3", "10.1.2.3 172.17.0.1", "10.1.2.3"),
        ("fe80::1 10.1.2.3", "", "10.1.2.3"),
        ("127.0.1.1", "10.1.2.3 fd00::2", "10.1.2.3"),
        ("::1 fe80::1%eth0", "169.254.3.4 fd00::2", "[fd00::2]"),
        ("fd00::2 10.1.2.3", "", "10.1.2.3"),
        ("", "10.1.2.3", "10.1.2.3"),
    ],
)
def test_the_address_is_one_that_other_nodes_reach(slurm, tmp_path, names, interfaces, address):
    process, record = slurm(str(tmp_path / "script.sh"), "a=1", NAMES=names, INTERFACES=interfaces)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    called = record.read_text()
    assert f"--head --node-ip-address={address.strip('[]')} --port=6379" in called
    assert f"--num-gpus=8 --address={address}:6379" in called  # the second node
    assert f"health-check --address {address}:6379" in called
    assert f"a=1 with {address}:6379 token\n" in called


@pytest.mark.parametrize(
    ("arguments", "variables", "code", "message"),
    [
        ([], {}, 2, "usage: sbatch --nodes=N recipe/asyppo/slurm.sh SCRIPT [any verl override]"),
        (["no/such.sh"], {}, 2, "SCRIPT [any verl override] (there is no file no/such.sh)"),
        (["{script}"], {"NO_TOKENS": "1"}, 2, "has no token authentication; update it, or set RAY_AUTH_MODE=disabled"),
        (
            ["{script}"],
            {"NAMES": "127.0.0.1 ::1"},
            1,
            "no address of first can be reached from others; set HEAD_ADDRESS",
        ),
    ],
)
def test_what_cannot_work_is_said_before_a_cluster_starts(slurm, tmp_path, arguments, variables, code, message):
    process, record = slurm(*(part.format(script=tmp_path / "script.sh") for part in arguments), **variables)
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output) == (code, "") and message in errors
    assert "ray.scripts.scripts" not in record.read_text()


def test_the_user_may_choose_address_and_no_token(slurm, tmp_path):
    chosen = {"HEAD_ADDRESS": "192.0.2.9", "RAY_AUTH_MODE": "disabled", "NO_TOKENS": "1", "NAMES": "127.0.0.1"}
    process, record = slurm(str(tmp_path / "script.sh"), **chosen)
    assert process.wait(timeout=30) == 0
    assert "with 192.0.2.9:6379 disabled\n" in record.read_text()


def test_a_signal_ends_the_training_before_the_cluster(slurm, tmp_path):
    script = tmp_path / "training.sh"
    script.write_text('trap \'echo training >> "$RECORD"; exit 7\' TERM; echo started >> "$RECORD"; sleep 60 & wait')
    process, record = slurm(str(script))
    deadline = time.monotonic() + 30
    while not ("started" in (seen := record.read_text()) and seen.count("block") == 2) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 7
    assert record.read_text().splitlines()[-3:] == ["training", "cluster", "cluster"]
