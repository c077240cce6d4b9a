"""Files of the user that verl looks at after minutes: code, and data that may not last for the run."""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from asyppo_verl.config import check_known
from asyppo_verl.critic_settings import Run

CODE = {
    "reward.custom_reward_function.path": "reward.custom_reward_function.name",
    "data.custom_cls.path": "data.custom_cls.name",
    "trainer.v1.sampler.custom_sampler.path": "trainer.v1.sampler.custom_sampler.name",
}
"""Settings that name Python files of the user, and what is taken from them."""


def check_code(run: Run) -> Iterator[str]:
    """Refuse Python files that are not there or do not compile; with several nodes they need not be on this one."""
    for path_key, name_key in CODE.items():
        path, name = run.get(path_key), run.get(name_key)
        if not path or not name or "://" in str(path) or run.config.trainer.nnodes > 1:
            continue
        file = Path(str(path)).expanduser()
        if not file.exists():
            raise ValueError(f"{path_key}={path} does not exist; name a Python file")
        try:
            text = file.read_bytes()
            compile(text, str(file), "exec")
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"{path_key}={path} is not Python that can be read ({error}); correct the file") from error
        if str(name).encode() not in text and b"import *" not in text:
            yield f"{name_key}={name!r} does not occur in {path_key}={path}"


def check_data(run: Run) -> Iterator[str]:
    """Refuse parquet files without prompts, or with fewer rows than a batch; say how many steps they last.

    verl leaves out rows later (``data.filter_overlong_prompts``), so the data last for at most that many.
    """
    data, trainer = run.config.data, run.config.trainer
    if run.get("data.custom_cls.path"):
        return  # what the user's own dataset reads, and how, is not known here
    rows, limit, batch = _rows(run), data.get("train_max_samples", -1), data.train_batch_size
    if rows is None:
        return
    used = min(rows, limit) if limit and limit > 0 else rows
    if used < batch:
        raise ValueError(
            f"data.train_batch_size={batch} is more than the {used} rows of data.train_files"
            + (f" that data.train_max_samples={limit} leaves" if used < rows else "")
            + "; lower it, or give more rows"
        )
    steps, wanted = used // batch * trainer.total_epochs, trainer.total_training_steps
    if wanted is not None and steps < wanted:
        yield (
            f"the data last for {steps} steps at most ({used} rows // data.train_batch_size={batch} * "
            f"trainer.total_epochs={trainer.total_epochs}), and the run will end then, before "
            f"trainer.total_training_steps={wanted}; set trainer.total_epochs={math.ceil(wanted / (used // batch))} to reach it"
        )


def _rows(run: Run) -> int | None:
    """Rows of ``data.train_files``, from the last bytes of each; None if they cannot be counted here."""
    import pyarrow
    from pyarrow import parquet

    files: Any = run.config.data.train_files
    prompt_key, rows = run.config.data.prompt_key, 0
    for file in files if OmegaConf.is_list(files) else [files]:
        try:
            metadata = parquet.read_metadata(os.path.expanduser(file))
        except (pyarrow.ArrowException, OSError, TypeError):
            return None  # another format, another place, or not there, which verl says first of all
        columns = metadata.schema.to_arrow_schema().names
        check_known("data.prompt_key", prompt_key, columns)
        rows += metadata.num_rows
    return rows
