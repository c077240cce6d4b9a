r"""Rule-based reward for mathematics, in the form of verl's ``reward.custom_reward_function``.

A response scores 1 if the content of its last ``\boxed{...}`` equals the ground truth, else 0: no partial credit, no
fall-back. verl calls from many threads, where math-verify's time-outs cannot work (they need signals in the main thread), so
math-verify runs in processes (:mod:`recipe.asyppo.reward.grader`) with bounded time and memory, which end with this one.

    reward.custom_reward_function.path=pkg://recipe.asyppo.reward.math_reward
    +reward.custom_reward_function.reward_kwargs.seconds=2      # time for one answer
"""

import importlib.util
import json
import numbers
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

from recipe.asyppo.reward.answer_text import last_boxed, number, plain

if importlib.util.find_spec("math_verify") is None:
    # Raised in a call it would be one more response without a score: verl logs that, and trains on.
    raise ImportError(
        "recipe.asyppo.reward.math_reward needs math-verify, which is not installed: on every node, "
        "pip install 'verl[vllm,fsdp,math]==0.9.1', or only pip install 'math-verify[antlr4_9_3]'"
    )
# Longer than any ground truth by far; a longer answer is wrong without being read.
LONGEST_ANSWER = 1000


class Graders:
    """Grading processes, each started when first needed, for any number of threads."""

    def __init__(self, processes: int, seconds: float, megabytes: int) -> None:
        for name, value in {"processes": processes, "seconds": seconds, "megabytes": megabytes}.items():
            kinds = (int, float) if name == "seconds" else (int,)
            if type(value) not in kinds or not 0 < value < 1e9:
                raise ValueError(
                    f"reward_kwargs.{name}={value!r} must be a {'number' if len(kinds) > 1 else 'whole number'} above 0"
                )
        self._command = [sys.executable, "-P", "-m", "recipe.asyppo.reward.grader", str(seconds), str(megabytes)]
        self._own = threading.local()
        # A thread of its own per process: the executor's queue serves whoever has waited longest.
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="grading")

    def equal(self, truth: str, answer: str) -> bool | None:
        """Equality of two plain answers; None where the process ended: time or memory did not suffice."""
        return self._threads.submit(self._ask, truth, answer).result()

    def _start(self) -> subprocess.Popen:
        # It finds the modules that this process finds.
        paths = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=paths)
        if process.stdout is None or process.stdout.readline() != "ready\n":
            command = " ".join(self._command)
            raise RuntimeError(
                f"`{command}` ended at its start; the reason is above: pip install 'math-verify[antlr4_9_3]'?"
            )
        return process

    def _ask(self, truth: str, answer: str) -> bool | None:
        process: subprocess.Popen
        self._own.process = process = getattr(self._own, "process", None) or self._start()
        try:
            print(json.dumps([truth, answer]), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())  # type: ignore[union-attr]
        except (BrokenPipeError, json.JSONDecodeError):
            process.kill()
            process.communicate()
            self._own.process = None
            return None


_graders_lock, _graders = threading.Lock(), cache(Graders)


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str | float,
    extra_info: dict | None = None,
    *,
    processes: int = 2,
    seconds: float = 5.0,
    megabytes: int = 1024,
    **others: Any,
) -> dict[str, float | str]:
    """Score one response with grading processes that have ``seconds`` and ``megabytes`` for one answer.

    Returns:
        ``score`` and ``acc`` (0 or 1), ``pred`` (the answer in plain notation, empty without one, by which verl's
        validation takes its majority votes) and ``gave_up`` (1 where the limits were too tight to decide: score 0).

    Raises:
        ValueError: an option is unknown or not a number above 0, or the ground truth is neither text nor a number.
    """
    # verl adds its own two where there is a reward model.
    if unknown := sorted(set(others) - {"reward_router_address", "reward_model_tokenizer"}):
        raise ValueError(f"reward_kwargs of the reward are processes, seconds and megabytes, not {', '.join(unknown)}")
    with _graders_lock:
        graders = _graders(processes, seconds, megabytes)
    if (
        not isinstance(ground_truth, str | numbers.Real)
        or ground_truth != ground_truth
        or not str(ground_truth).strip()
    ):
        row = f"row {(extra_info or {}).get('index', '(no index)')} of {data_source}"
        raise ValueError(
            f"reward_model.ground_truth={ground_truth!r} in {row} must be text or a number; mend or drop the row"
        )
    boxed = last_boxed(solution_str)
    if boxed is None or len(boxed) > LONGEST_ANSWER:
        return {"score": 0.0, "acc": 0.0, "pred": "", "gave_up": 0.0}
    truth, answer = plain(str(ground_truth)), plain(boxed)
    exact, value = number(truth), number(answer)
    same = truth == answer or (exact is not None and exact == value)
    verdict = same or graders.equal(truth, answer)
    score = float(bool(verdict))
    return {
        "score": score,
        "acc": score,
        "pred": answer if value is None else str(value),
        "gave_up": float(verdict is None),
    }
