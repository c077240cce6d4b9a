r"""Rule-based reward for mathematics, in the form of verl's ``reward.custom_reward_function``.

A response scores 1 if the content of its last ``\boxed{...}`` equals the ground truth, else 0; there is no partial credit
and no fall-back, so a response without a box, or one that was cut off inside it, scores 0. Most answers are settled as
text or as plain numbers (:mod:`recipe.asyppo.reward.answer_text`); the rest goes to math-verify.

verl calls the function from many threads of a reward worker, where math-verify's own time-outs cannot work (they need
signals in the main thread), so math-verify runs in grading processes (:mod:`recipe.asyppo.reward.grader`) that are bounded in
time and memory. They end with the reward worker, however that ends.

    reward.custom_reward_function.path=pkg://recipe.asyppo.reward.math_reward
    +reward.custom_reward_function.reward_kwargs.seconds=2      # time for one answer
"""

import importlib.util
import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from recipe.asyppo.reward.answer_text import canonical, compare_text, last_boxed, tidy

if importlib.util.find_spec("math_verify") is None:
    # Raised in a call it would be one more response without a score: verl logs that, and trains on.
    raise ImportError(
        "recipe.asyppo.reward.math_reward needs math-verify, which is not installed: pip install 'verl[vllm,fsdp,math]==0.9.1', "
        "or only pip install 'math-verify[antlr4_9_3]', on every node"
    )

# Longer than any ground truth by far; a longer answer is wrong without being read.
LONGEST_ANSWER = 1000
_pools_lock = threading.Lock()


class GradingProcess:
    """One running :mod:`recipe.asyppo.reward.grader`; used by one thread at a time."""

    def __init__(self, seconds: float, megabytes: int) -> None:
        program = Path(__file__).with_name("grader.py")
        # -P: modules beside the program must not hide those of sympy.
        command = [sys.executable, "-P", str(program), str(seconds), str(megabytes)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self._read() != "ready":
            raise RuntimeError(
                f"the grading process ended at its start (exit status {self.process.wait()}): `{' '.join(command)}`; "
                "the reason is above, most often that math-verify is missing: pip install 'math-verify[antlr4_9_3]'"
            )

    def _read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def equal(self, truth: str, answer: str) -> bool | None:
        """Whether two tidy answers are equal; None where time or memory did not suffice.

        Raises:
            BrokenPipeError: the process is gone, ended from outside.
        """
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([truth, answer]) + "\n")
        self.process.stdin.flush()
        if not (reply := self._read()):
            raise BrokenPipeError
        return json.loads(reply)

    def close(self) -> None:
        """End the process; one that is busy goes when its time is over."""
        self.process.kill()
        self.process.communicate()


class GradingPool:
    """Grading processes behind one queue, each started when first needed, for any number of threads."""

    def __init__(self, processes: int, seconds: float, megabytes: int) -> None:
        self._limits = (seconds, megabytes)
        self._own = threading.local()
        # A thread of its own per process: the executor's queue serves whoever has waited longest.
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="grading")

    def equal(self, truth: str, answer: str) -> bool | None:
        """As :meth:`GradingProcess.equal`; a process that was ended from outside counts as None and is replaced."""
        return self._threads.submit(self._ask, truth, answer).result()

    def _ask(self, truth: str, answer: str) -> bool | None:
        process = getattr(self._own, "process", None) or GradingProcess(*self._limits)
        self._own.process = process
        try:
            return process.equal(truth, answer)
        except BrokenPipeError:
            process.close()
            self._own.process = None
            return None


@cache
def _make_pool(processes: int, seconds: float, megabytes: int) -> GradingPool:
    return GradingPool(processes, seconds, megabytes)


def pool(processes: int, seconds: float, megabytes: int) -> GradingPool:
    """The one pool of this Python process with these limits."""
    with _pools_lock:
        return _make_pool(processes, seconds, megabytes)


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict | None = None,
    *,
    processes: int = 2,
    seconds: float = 5.0,
    megabytes: int = 1024,
    **_: Any,
) -> dict[str, float | str]:
    """Score one response.

    Args:
        ground_truth: the answer, without a box.
        processes, seconds, megabytes: grading processes of this reward worker, and the limits of one answer.

    Returns:
        ``score`` and ``acc`` (0 or 1), ``pred`` (the answer in plain notation, empty without one, by which verl's
        validation takes its majority votes) and ``gave_up`` (1 where the limits were too tight to decide: score 0).
    """
    boxed = last_boxed(solution_str)
    if boxed is None or len(boxed) > LONGEST_ANSWER:
        return {"score": 0.0, "acc": 0.0, "pred": "", "gave_up": 0.0}
    truth, answer = tidy(ground_truth), tidy(boxed)
    verdict = compare_text(truth, answer)
    gave_up = False
    if verdict is None:
        verdict = pool(processes, seconds, megabytes).equal(truth, answer)
        gave_up = verdict is None
    score = float(bool(verdict))
    return {"score": score, "acc": score, "pred": canonical(answer), "gave_up": float(gave_up)}
