"""Evaluate a model through verl's own validation: ``python -m recipe.asyppo.evaluation.evaluate [--out DIR] TARGET OVERRIDES``.

``scripts/evaluate.sh`` gives the overrides. Rollout engine, chat template and reward are those of training. The folder
then holds ``results.md``, ``results.json``, ``samples.jsonl`` (every response) and ``log``; a finished one is kept.
"""

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet

from recipe.asyppo.console import ask, is_question, run
from recipe.asyppo.evaluation import results
from recipe.asyppo.evaluation.checkpoints import Source, as_huggingface, locate
from recipe.asyppo.run_folder import alone, setting

COLUMNS = {"data_source", "prompt", "reward_model"}
SETTINGS = {
    "k": "actor_rollout_ref.rollout.val_kwargs.n",
    "temperature": "actor_rollout_ref.rollout.val_kwargs.temperature",
    "top_p": "actor_rollout_ref.rollout.val_kwargs.top_p",
    "top_k": "actor_rollout_ref.rollout.val_kwargs.top_k",
    "max_response_length": "data.max_response_length",
    "max_problems": "data.val_max_samples",
    "reward": "reward.custom_reward_function.path",
    "files": "data.val_files",
}

MODEL = ("*.safetensors", "*.bin", "*.json", "*.jinja", "model_world_size_*", "huggingface/*")
"""The files that a model consists of, in a Hugging Face folder or an FSDP checkpoint."""


def read_settings(overrides: list[str]) -> dict[str, str]:
    """The settings that decide on the figures, from verl's command line."""
    return {name: value for name, key in SETTINGS.items() if (value := setting(overrides, key)) is not None}


def problem_files(settings: dict[str, str]) -> list[str]:
    """The names in ``data.val_files``."""
    return [name for name in settings["files"].strip("[]").split(",") if name]


def count_problems(settings: dict[str, str]) -> int:
    """Number of problems that verl will read from the files.

    Raises:
        ValueError: if a file is missing, unreadable or not in verl's schema.
    """
    total = 0
    for name in problem_files(settings):
        if not Path(name).exists():
            raise ValueError(f"data.val_files: {name} does not exist; set VAL_FILES, or DATA_DIR to prepared data")
        try:
            file = pyarrow.parquet.ParquetFile(name)
        except (OSError, pyarrow.ArrowException) as error:
            raise ValueError(f"data.val_files: {name} cannot be read as parquet: {error}") from error
        missing = COLUMNS - set(file.schema_arrow.names)
        if missing:
            raise ValueError(f"data.val_files: {name} has no column {sorted(missing)[0]}, which verl's schema wants")
        kind = file.schema_arrow.field("prompt").type
        if not (pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)):
            raise ValueError(
                f"data.val_files: the prompts in {name} are no messages; make each "
                '[{"role": "user", "content": text}]'
            )
        total += file.metadata.num_rows
    if not total:
        raise ValueError(f"data.val_files={settings['files']} holds no problem; set VAL_FILES")
    limit = int(settings.get("max_problems", -1))
    return min(total, limit) if limit > 0 else total


def length_override(model: str, overrides: list[str]) -> list[str]:
    """The longest sequence as vLLM's limit: by default it is the model's, whose cache not every card holds."""
    key, config = "actor_rollout_ref.rollout.max_model_len", Path(model, "config.json")
    lengths = [setting(overrides, f"data.max_{part}_length") for part in ("prompt", "response")]
    if setting(overrides, key) or None in lengths or not config.exists():  # a name on the hub keeps the default
        return []
    facts = json.loads(config.read_text())
    most = facts.get("text_config", facts).get("max_position_embeddings", math.inf)
    return [f"{key}={min(sum(map(int, filter(None, lengths))), most)}"]


def generate(
    source: Source, out: Path, overrides: list[str], *, problems: int, verbose: bool, held: Sequence[int]
) -> None:
    """Let verl sample and score, then keep every response in ``samples.jsonl``."""
    dump, log = out / ".dump", out / "log"
    with as_huggingface(source, out / ".model", log) as model:
        shutil.rmtree(dump, ignore_errors=True)
        command = [sys.executable, "-m", "verl.trainer.main_ppo", f"actor_rollout_ref.model.path={model}"]
        command += [
            *overrides,
            *length_override(model, overrides),
            f"trainer.validation_data_dir={dump}",
            f"hydra.run.dir={out / 'hydra'}",
        ]
        code = run(out, command, verbose=verbose, held=held)
    if code:
        sys.exit(code)
    samples = results.read_dump(dump / "0.jsonl")
    results.check_complete(samples, problems=problems, k=int(setting(overrides, SETTINGS["k"]) or 1), log=log)
    results.write(out / "samples.jsonl", "".join(json.dumps(sample) + "\n" for sample in samples))
    shutil.rmtree(dump)


def evaluate(target: str, out: Path | None, overrides: list[str], *, verbose: bool = False) -> Path:
    """Write the tables of ``target``; returns their folder. What is already there is not done again.

    Raises:
        ValueError: if something is missing, or the folder holds an evaluation of something else.
    """
    source, settings = locate(target), read_settings(overrides)
    if not Path(settings["reward"]).exists():
        raise ValueError(f"reward.custom_reward_function.path={settings['reward']} does not exist; set REWARD")
    problems = count_problems(settings)
    # How Ray is started has no part in the figures; on a CPU its folder is another one every time.
    decisive = [part for part in overrides if "ray_kwargs" not in part]
    read = [*problem_files(settings), settings["reward"]]
    read += [str(path) for pattern in MODEL for path in Path(source.path).glob(pattern)]
    files = {name: [(stat := os.stat(name)).st_size, stat.st_mtime_ns] for name in read}
    request = {"target": source.path, "settings": settings, "overrides": decisive, "files": files}
    out = (out or source.default_out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    kept, samples = out / "request.json", out / "samples.jsonl"
    with alone(out) as held:
        if kept.exists() and {**request, **json.loads(kept.read_text())} != request:
            if samples.exists():
                raise ValueError(f"{out} holds another evaluation ({kept}); set OUT to another folder, or move it away")
            print(f"starting afresh: {out} holds an unfinished evaluation with other settings")
        results.write(kept, json.dumps(request, indent=2))
        if samples.exists():
            print(f"the responses are already in {out}")
        else:
            generate(source, out, overrides, problems=problems, verbose=verbose, held=held)
        table = {"target": source.path, "settings": settings, **results.evaluate(results.read_lines(samples))}
        results.write(out / "results.json", json.dumps(table, indent=1))
        results.write(out / "results.md", results.markdown(table))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where to write; default: evaluation/ in the run folder")
    parser.add_argument("--verbose", action="store_true", help="show the complete log")
    parser.add_argument("target", help="Hugging Face folder or hub name, checkpoint folder, or run folder")
    parser.add_argument(
        "overrides", nargs=argparse.REMAINDER, help="verl overrides, which decide on data, sampling and hardware"
    )
    arguments = parser.parse_args()
    model = f"actor_rollout_ref.model.path={arguments.target}"
    command = [sys.executable, "-m", "verl.trainer.main_ppo", model, *arguments.overrides]
    if is_question(command):
        ask(command)
    try:
        out = evaluate(arguments.target, arguments.out, arguments.overrides, verbose=arguments.verbose)
    except ValueError as error:
        sys.exit(f"evaluate: {error}")
    print("\n" + (out / "results.md").read_text())
    print(f"written to {out} (results.md, results.json, samples.jsonl, log)")


if __name__ == "__main__":
    main()
