"""Files that verl would only look for, or look into, when everything has been started."""

import ast
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from asyppo_verl.config import nearest

CODE = {
    "reward.custom_reward_function.path": "reward.custom_reward_function.name",
    "data.custom_cls.path": "data.custom_cls.name",
    "trainer.v1.sampler.custom_sampler.path": "trainer.v1.sampler.custom_sampler.name",
}
"""Settings that name Python files of the user, and what is taken from them."""

DATA = ("data.train_files", "data.val_files")
FORMATS = (".parquet", ".json", ".jsonl")
"""What verl's own dataset reads."""


def check_paths(config: DictConfig) -> None:
    """Look at the files that a configuration names; with several nodes they need not be on this one.

    Raises:
        ValueError: naming key, value and what is wrong.
    """
    if config.trainer.nnodes > 1:
        return
    for path_key, name_key in CODE.items():
        path = OmegaConf.select(config, path_key)
        if path:
            check_exists(path_key, path)
            _check_name(path_key, path, name_key, OmegaConf.select(config, name_key))
    check_exists("actor_rollout_ref.model.tokenizer_path", config.actor_rollout_ref.model.get("tokenizer_path"))
    _check_data(config)
    reward_model = config.reward.reward_model
    if reward_model.enable:
        if not reward_model.model_path:
            raise ValueError(
                f"reward.reward_model.model_path={reward_model.model_path!r} must name a model while "
                "reward.reward_model.enable=True; name a folder or hub repository in Hugging Face format"
            )
        check_exists("reward.reward_model.model_path", reward_model.model_path)


def check_exists(key: str, path: Any) -> None:
    """Raises ValueError if a local path is given that does not exist; models may also be repositories of a hub."""
    if not path:
        return
    if not isinstance(path, str):
        raise ValueError(f"{key}={path!r} must be a path")
    is_repository = key.endswith(("tokenizer_path", "model_path")) and not path.startswith(("/", "~", "."))
    if not is_repository and not _is_remote(path) and not os.path.exists(os.path.expanduser(path)):
        raise ValueError(f"{key}={path} does not exist; name one that does")


def _is_remote(path: str) -> bool:
    return "://" in path


def _check_name(path_key: str, path: str, name_key: str, name: Any) -> None:
    """Look for a function or class in a Python file without running it."""
    if _is_remote(path) or not path.endswith(".py"):
        return
    try:
        tree = ast.parse(Path(path).expanduser().read_bytes())
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{path_key}={path} is not Python that can be read ({error}); correct the file") from error
    names = set(_bound(tree.body))
    if name not in names and not names & {"*", "__getattr__"}:
        raise ValueError(
            f"{name_key}={name!r} is not in {path_key}={path}{nearest(str(name), sorted(names))}; name a function or class "
            "of that file"
        )


def _bound(statements: list[ast.stmt]) -> Iterator[str]:
    """Names that a module has when it has been run; "*" where another module decides."""
    for statement in statements:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield statement.name
            continue
        for node in ast.walk(statement):
            if isinstance(node, ast.alias):
                yield (node.asname or node.name).split(".")[0]
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield node.name


def _check_data(config: DictConfig) -> None:
    data = config.data
    if (data.get("custom_cls") or {}).get("path"):
        return  # what the user's own dataset reads, and how, is not known here
    for key in DATA:
        value = OmegaConf.select(config, key)
        files = list(value) if OmegaConf.is_list(value) else [value]
        if not files or not all(isinstance(file, str) and file for file in files):
            raise ValueError(f"{key}={value!r} must name a file, or a list of files, of prompts")
        for file in files:
            check_exists(key, file)
            if not file.endswith(FORMATS):
                raise ValueError(f"{key}={file} has a format that verl does not read; name one of {', '.join(FORMATS)}")
        local = [file for file in files if file.endswith(".parquet") and os.path.isfile(os.path.expanduser(file))]
        rows = [_rows(key, file, data.prompt_key) for file in local]
        if key == "data.train_files" and len(rows) == len(files):
            _check_enough(data, sum(rows))


def _rows(key: str, file: str, prompt_key: str) -> int:
    """Number of rows of a parquet file, from its last bytes."""
    import pyarrow
    from pyarrow import parquet

    try:
        metadata = parquet.read_metadata(os.path.expanduser(file))
        columns = metadata.schema.to_arrow_schema().names
    except (pyarrow.ArrowException, OSError) as error:
        said = str(error).splitlines()[0]
        raise ValueError(
            f"{key}={file} is not a parquet file that can be read ({said}); make or copy it again"
        ) from error
    if prompt_key not in columns:
        raise ValueError(
            f"data.prompt_key={prompt_key!r} is not a column of {key}={file}{nearest(str(prompt_key), columns)}; it has "
            f"{', '.join(columns)}"
        )
    return metadata.num_rows


def _check_enough(data: DictConfig, rows: int) -> None:
    limit = data.get("train_max_samples", -1)
    used = min(rows, limit) if limit and limit > 0 else rows
    if used < data.train_batch_size:
        raise ValueError(
            f"data.train_batch_size={data.train_batch_size} is more than the {used} rows of data.train_files"
            + (f" that data.train_max_samples={limit} leaves" if used < rows else "")
            + "; lower it, or give more rows"
        )
