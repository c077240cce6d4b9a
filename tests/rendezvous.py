"""Loaded into every process of a run by VERL_USE_EXTERNAL_MODULES: the actor and the critics wait for each other.

Each may pass its log-probs or evaluation, and its update, only when all the others have begun theirs. A run that does one
after the other stops here with an error.
"""

import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import wrapt

FOLDER, PARTIES = Path(os.environ["RENDEZVOUS_DIR"]), int(os.environ["RENDEZVOUS_PARTIES"])
TIMEOUT = 60
_calls: Counter = Counter()


def _meeting(event: str) -> Any:
    def wrapper(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        critics = getattr(instance, "critics", None)
        if critics and args[0].extra_info.get("asyppo_critic_id", max(critics)) != max(critics):
            return wrapped(
                *args, **kwargs
            )  # the last of several critics in one process is the one that meets the others
        _calls[event] += 1
        folder = FOLDER / f"{event}_{_calls[event]}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ("actor" if critics is None else f"critics_{'_'.join(map(str, critics))}")).touch()
        deadline = time.monotonic() + TIMEOUT
        while len(list(folder.iterdir())) < PARTIES:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{event} began alone: {sorted(path.name for path in folder.iterdir())}")
            time.sleep(0.01)
        return wrapped(*args, **kwargs)

    return wrapper


def _wrap(cls: str, **events: str) -> Any:
    return lambda module: [
        wrapt.wrap_function_wrapper(module, f"{cls}.{method}", _meeting(event)) for method, event in events.items()
    ]


wrapt.register_post_import_hook(
    _wrap("ActorRolloutRefWorker", compute_log_prob="evaluation", update_actor="update"), "verl.workers.engine_workers"
)
wrapt.register_post_import_hook(
    _wrap("MiniCriticEnsembleWorker", infer_batch="evaluation", train_mini_batch="update"), "asyppo_verl.critic_worker"
)
