"""Data of the run: prompts that verl can read."""

import os
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
