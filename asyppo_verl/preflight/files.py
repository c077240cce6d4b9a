"""Data of the run: prompts that verl can read, and how long they last."""

import functools
import math
import os
from collections.abc import Iterator
from typing import Any

from omegaconf import OmegaConf

from asyppo_verl.critic_settings import Run


def check_prompts(run: Run) -> None:
    """Refuse prompts that are plain text, of which a chat template leaves nothing, without a word."""
    from pyarrow import types

    key = run.config.data.prompt_key
    for files in ("data.train_files", "data.val_files"):
        for name, metadata in _parquet(run, files):
            schema = metadata.schema.to_arrow_schema()
            kind = schema.field(key).type if key in schema.names else None
            if kind and (types.is_string(kind) or types.is_large_string(kind)):
                raise ValueError(
                    f"{files}={name}: the prompts in column {key!r} are plain text, and verl reads messages; make each "
                    '[{"role": "user", "content": text}]'
                )


def check_data(run: Run) -> Iterator[str]:
    """Say it where the data end before ``trainer.total_training_steps``, at which verl would not save the last step.

    verl leaves out rows later (``data.filter_overlong_prompts``), so the data last for that many steps at most.
    """
    data, trainer, rows = run.config.data, run.config.trainer, _rows(run)
    limit, wanted = data.get("train_max_samples", -1), trainer.total_training_steps
    if rows is None or wanted is None:
        return
    used = min(rows, limit) if limit and limit > 0 else rows
    of_epoch = used // data.train_batch_size
    steps = of_epoch * trainer.total_epochs
    if 0 < steps < wanted:
        yield (
            f"the data last for {steps} steps at most ({used} rows // data.train_batch_size={data.train_batch_size} * "
            f"trainer.total_epochs={trainer.total_epochs}), and the run will end then, before "
            f"trainer.total_training_steps={wanted}; set trainer.total_epochs={math.ceil(wanted / of_epoch)} to reach it"
        )


def _rows(run: Run) -> int | None:
    """Rows of ``data.train_files``; None if they cannot be counted here."""
    return sum(metadata.num_rows for _, metadata in _parquet(run, "data.train_files")) or None


@functools.lru_cache(maxsize=16)
def _parquet(run: Run, key: str) -> list[tuple[str, Any]]:
    """Names of the files that a key lists, and what stands in the last bytes of each; nothing if that is not known here."""
    import pyarrow
    from pyarrow import parquet

    files: Any = run.get(key)
    if run.get("data.custom_cls.path"):
        return []  # what the user's own dataset reads, and how, is not known here
    try:
        names = [os.path.expanduser(file) for file in (files if OmegaConf.is_list(files) else [files])]
        return [(name, parquet.read_metadata(name)) for name in names]
    except (pyarrow.ArrowException, OSError, TypeError):
        return []  # another format, another place, or not there, which verl says first of all
