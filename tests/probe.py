"""A window into a training run: a module for ``VERL_USE_EXTERNAL_MODULES``, so verl imports it in every process.

* Prompt ids, which verl draws with ``uuid4`` also when it replays rollouts, become a function of step and position.
* ``PROBE_DIR/step_<n>.pt`` gets what step n computed for every response, by row key.
* ``PROBE_KILL=<step>:<moment>`` ends the run with SIGKILL: while it rolls out ("rollout"), between two optimizer steps of a
  critic ("critic"), with half a file of the checkpoint written ("half <beginning of its path>"), or when the first of the
  older checkpoints has been removed ("removal"). The session to kill is in ``PROBE_DIR/session``.
"""

import contextlib
import io
import itertools
import os
import shutil
import signal
import sys
import threading
import uuid
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import wrapt
from processes import of_session

FIELDS = ["values", "advantages", "returns", "old_log_probs", "entropy", "response_mask", "rm_scores", "responses"]
FOLDER = Path(os.environ["PROBE_DIR"])
KILL_STEP, _, KILL_MOMENT = os.environ.get("PROBE_KILL", "").partition(":")
HALF = KILL_MOMENT.removeprefix("half ") if KILL_MOMENT.startswith("half ") else ""


def _ids_by_step(trainer_base: Any) -> None:
    """Give ``trainer_base`` alone a ``uuid4`` that returns the same ids in every run of the same step."""
    from verl.utils.skip import SkipManager

    counters: dict[int, itertools.count] = {}

    def uuid4() -> uuid.UUID:
        counter = counters.setdefault(SkipManager.step, itertools.count())
        return uuid.uuid5(uuid.NAMESPACE_OID, f"step {SkipManager.step}, prompt {next(counter)}")

    trainer_base.uuid = SimpleNamespace(uuid4=uuid4)


def _write_step(wrapped: Any, _instance: Any, args: Any, kwargs: Any) -> Any:
    import torch
    import transfer_queue as tq

    batch = args[0]
    keys = sorted(key for key, tag in zip(batch.keys, batch.tags, strict=True) if not tag.get("is_padding", False))
    data = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=FIELDS)
    rows = {field: dict(zip(keys, (row.clone() for row in data[field].unbind()), strict=True)) for field in FIELDS}
    step = {"rows": rows, "asyppo_active": "asyppo_verl.hooks" in sys.modules}
    torch.save(step, FOLDER / f"step_{kwargs['global_steps']}.pt")
    return wrapped(*args, **kwargs)


# -- ends ----------------------------------------------------------------------------------------------------------


def _kill() -> None:
    """Stop all, again until none is left, since some have just been forked; then kill: none of them sees another one end.

    Children go first: a stopped one whose parent has gone is woken by the kernel, with SIGHUP.
    """
    session, stopped = int((FOLDER / "session").read_text()), {os.getpid(): ""}

    def send(number: int, processes: Iterable[int]) -> None:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(process, number)

    while new := {process: command for process, command in of_session(session).items() if process not in stopped}:
        send(signal.SIGSTOP, new)
        stopped |= new
    del stopped[os.getpid()]
    send(signal.SIGKILL, sorted(stopped, reverse=True))
    os.kill(os.getpid(), signal.SIGKILL)


def _is_time(step: Any) -> bool:
    return str(step) == KILL_STEP


def _say_step(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    (FOLDER / "now").write_text(str(instance.global_steps))
    return wrapped(*args, **kwargs)


def _kill_while_rolling_out(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    submitted = wrapped(*args, **kwargs)
    if _is_time(instance.global_steps):
        threading.Timer(0.05, _kill).start()
    return submitted


def _kill_between_optimizer_steps(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    trained = wrapped(*args, **kwargs)
    if instance.config.model_type == "value_model" and _is_time((FOLDER / "now").read_text()):
        _kill()
    return trained


def _kill_while_writing(wrapped: Any, _instance: Any, args: Any, kwargs: Any) -> Any:
    state, file, *_ = args
    if isinstance(file, str) and f"global_step_{KILL_STEP}/{HALF}" in file:
        whole = io.BytesIO()
        wrapped(state, whole)
        Path(file).write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
        _kill()
    return wrapped(*args, **kwargs)


def _kill_after(wrapped: Any, _instance: Any, args: Any, kwargs: Any) -> None:
    wrapped(*args, **kwargs)
    _kill()


def _watch_removal(retention: Any) -> None:
    if KILL_MOMENT == "removal":
        wrapt.wrap_function_wrapper(retention, "remove_old", _watch_first_removal)


def _watch_first_removal(wrapped: Any, _instance: Any, args: Any, kwargs: Any) -> Any:
    if _is_time(args[1].since[-1]):
        wrapt.wrap_function_wrapper(shutil, "rmtree", _kill_after)
    return wrapped(*args, **kwargs)


def _watch_writing(_module: Any) -> None:
    import torch

    if HALF and not isinstance(torch.save, wrapt.FunctionWrapper):
        wrapt.wrap_function_wrapper(torch, "save", _kill_while_writing)


def _watch_trainer(trainer_base: Any) -> None:
    _ids_by_step(trainer_base)
    wrapt.wrap_function_wrapper(trainer_base, "PPOTrainer._compute_metrics", _write_step)
    wrapt.wrap_function_wrapper(trainer_base, "PPOTrainer.step", _say_step)
    if KILL_MOMENT == "rollout":
        wrapt.wrap_function_wrapper(trainer_base, "PPOTrainer._submit_batch_to_rollout", _kill_while_rolling_out)


def _watch_workers(engine_workers: Any) -> None:
    if KILL_MOMENT == "critic":
        wrapt.wrap_function_wrapper(engine_workers, "TrainingWorker.train_batch", _kill_between_optimizer_steps)


wrapt.register_post_import_hook(_watch_trainer, "verl.trainer.ppo.v1.trainer_base")
wrapt.register_post_import_hook(_watch_workers, "verl.workers.engine_workers")
for module in ("verl.trainer.ppo.v1.trainer_base", "verl.workers.engine_workers"):
    wrapt.register_post_import_hook(_watch_writing, module)
wrapt.register_post_import_hook(_watch_removal, "asyppo_verl.retention")
