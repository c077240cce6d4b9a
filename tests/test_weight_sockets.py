"""Two runs on one machine, each with a Ray cluster of its own: each vLLM gets the weights of its own trainer."""

import json
import subprocess
import sys

import pytest


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_weights_stay_in_their_cluster(root, toy):
    script = [sys.executable, str(root / "tests/weight_transfer.py"), str(toy)]
    runs = [
        subprocess.Popen([*script, value], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for value in ("1", "2")
    ]
    try:
        for run in runs:
            assert "ready\n" in iter(run.stdout.readline, "")
        # Both vLLMs wait now; only then does the first trainer send, and the second after it.
        ends = [json.loads(run.communicate("send\n", timeout=300)[0].splitlines()[-1]) for run in runs]
    finally:
        for run in runs:
            run.kill()
            run.wait()
    assert [end["received"] for end in ends] == [1, 2]
    assert all(end["sender"] == end["receiver"] for end in ends)
    assert ends[0]["sender"] != ends[1]["sender"]
    # The longest path that the system takes is 107 bytes; some room for replica and rank.
    assert all(len(end["sender"].removeprefix("ipc://")) <= 100 for end in ends)
