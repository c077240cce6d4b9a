r"""Rule-based reward for mathematics, in the form of verl's ``reward.custom_reward_function``.

A response scores 1 if the content of its last ``\boxed{...}`` equals the ground truth, else 0: no partial credit. verl calls
from many threads, where math-verify's time-outs cannot work (they need signals in the main thread), so math-verify runs in
processes (:mod:`recipe.asyppo.reward.grader`) with bounded time and memory, which end with this one.

    reward.custom_reward_function.path=pkg://recipe.asyppo.reward.math_reward
    +reward.custom_reward_function.reward_kwargs.seconds=2      # time for one answer
"""

import importlib.util
import json
import os
import queue
import subprocess
import sys
import threading
from functools import cache
from numbers import Real
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
            if type(value) not in ((int, float) if name == "seconds" else (int,)) or not 0 < value < 1e9:
                raise ValueError(f"reward_kwargs.{name}={value!r} must be above 0, and whole except for seconds")
        self._command = [sys.executable, "-P", "-m", "recipe.asyppo.reward.grader", str(seconds), str(megabytes)]
        self._idle: queue.LifoQueue[Any] = queue.LifoQueue()
        for _ in range(processes):
            self._idle.put(None)

    def equal(self, truth: str, answer: str) -> bool | None:
        """Equality of two plain answers; None where the process ended: time or memory did not suffice."""
        process = self._idle.get()
        try:
            process = process or self._start()
            print(json.dumps([truth, answer]), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            process.kill()
            process.communicate()
            process = None
            return None
        finally:
            self._idle.put(process)

    def _start(self) -> Any:
        # It finds the modules that this process finds.
        paths = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        process: Any = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=paths
        )
        if process.stdout.readline() != "ready\n":
            raise RuntimeError(f"{self._command} ended at its start, see above: pip install 'math-verify[antlr4_9_3]'?")
        return process


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
    """Score one response, with ``seconds`` and ``megabytes`` for each of the grading ``processes``.

    Returns:
        ``score`` and ``acc`` (0 or 1), ``pred`` (the answer in plain notation, empty without one, by which verl's
        validation takes its majority votes) and ``gave_up`` (1 where the limits were too tight to decide: score 0).
    """
    # verl adds its own two where there is a reward model.
    if unknown := sorted(set(others) - {"reward_router_address", "reward_model_tokenizer"}):
        raise ValueError(f"reward_kwargs of the reward are processes, seconds and megabytes, not {', '.join(unknown)}")
    with _graders_lock:
        graders = _graders(processes, seconds, megabytes)
    if not isinstance(ground_truth, str | Real) or str(ground_truth).strip() in ("", "nan"):
        row = f"row {(extra_info or {}).get('index', '(no index)')} of {data_source}"
        raise ValueError(f"reward_model.ground_truth={ground_truth!r} in {row} must be text or a number; mend it")
    verdict: bool | None = False
    boxed, pred = last_boxed(solution_str), ""
    if boxed is not None and len(boxed) <= LONGEST_ANSWER:
        truth, answer = plain(str(ground_truth)), plain(boxed)
        exact, value = number(truth), number(answer)
        pred = answer if value is None else str(value)
        verdict = truth == answer or (exact is not None and exact == value) or graders.equal(truth, answer)
    score = float(bool(verdict))
    return {"score": score, "acc": score, "pred": pred, "gave_up": float(verdict is None)}
