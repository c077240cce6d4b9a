"""The token view: what a run kept with ``asyppo.inspect.every``, as much of it as a page holds."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from asyppo_verl.config import Inspect
from recipe.asyppo.report.page import embedded
from recipe.asyppo.report.runs import Run

ROOM = 1_900_000
"""Bytes of JSON that the responses of a page may take; a token takes about 50."""

FEW = 3
"""A text that is a token less often than this is in no list: its mean says little."""

MASKED, FILTERED, OBSERVATION = 1, 2, 4
"""Bits of a token's flags."""


def view(runs: Sequence[Run]) -> dict[str, Any]:
    """The inspected steps of all runs, newest first, and how many responses had no room on the page."""
    files = [(run, file) for run in runs for file in kept(run)]
    files.sort(key=lambda item: int(item[1].stem.removeprefix("step_")), reverse=True)
    steps, room, left_out = [], ROOM, 0
    for run, file in files:
        table = pd.read_parquet(file)
        step, used = one_step(run.name, table, room)
        shown = sum(len(group["responses"]) for group in step["groups"])
        left_out += len(table) - shown
        room -= used
        if shown:
            steps.append(step)
    return {"steps": steps, "left_out": left_out}


def kept(run: Run) -> list[Path]:
    """The files of a run: in its folder, or where its configuration says that its checkpoints are."""
    checkpoints = run.folder / "checkpoints"
    configured = Path((run.settings or {}).get("trainer.default_local_dir") or checkpoints)
    if not checkpoints.exists() and not (configured.parent / "metrics.jsonl").exists():  # or they are of the run there
        checkpoints = configured
    return sorted((checkpoints / Inspect.folder).glob("step_*.parquet"))


def one_step(run: str, table: pd.DataFrame, room: int) -> tuple[dict[str, Any], int]:
    """A step as the page shows it, and the bytes that it takes; the lists are of everything that was kept."""
    critics = sorted(column for column in table if column.startswith("value_"))
    groups, used = [], 0
    for _, rows in table.groupby("group", sort=False):
        responses = []
        for row in rows.to_dict("records"):
            response = one_response(row, critics)
            size = len(embedded(response).encode())
            if used + size <= room:
                responses.append(response)
                used += size
        if responses:
            groups.append({"prompt": rows["prompt"].iloc[0], "responses": responses})
    tokens = response_tokens(table)
    return {
        "run": run,
        "step": int(table["step"].iloc[0]),
        "critics": len(critics),
        "groups": groups,
        "high_sigma": float(tokens["sigma"].quantile(0.9)),
        "scale": {name: float(tokens[name].abs().quantile(0.99)) for name in ("sigma", "advantage", "entropy") if name in tokens},
        "lists": lists(tokens),
        "by_sigma": by_sigma(tokens),
    }, used  # fmt: skip


def one_response(row: dict[str, Any], critics: Sequence[str]) -> dict[str, Any]:
    """A row of the table; numbers to four digits."""
    flags = MASKED * row["masked"] + FILTERED * row["filtered"] + OBSERVATION * ~row["is_response"]
    entropy = {"entropy": _short(row["entropy"])} if "entropy" in row else {}
    return {
        "name": row["response"],
        "score": _short([row["score"]])[0],
        "tokens": list(row["token"]),
        "flags": flags.tolist(),
        "values": [_short(row[critic]) for critic in critics],
        "sigma": _short(row["sigma"]),
        "advantage": _short(row["advantage"]),
        "after": _short(row["advantage_after_mask"]),
        **entropy,
    }


def _short(values: Sequence[float]) -> list[float | None]:
    return [float(f"{value:.4g}") if np.isfinite(value) else None for value in values]


def response_tokens(table: pd.DataFrame) -> pd.DataFrame:
    """All response tokens of a step below each other."""
    names = [name for name in ("token", "sigma", "advantage", "entropy", "is_response") if name in table]
    tokens = table[names].explode(names)
    return tokens[tokens["is_response"].astype(bool)].astype(dict.fromkeys(names[1:-1], float))


def lists(tokens: pd.DataFrame, length: int = 12) -> list[dict[str, Any]]:
    """Texts with the highest and lowest mean sigma and |advantage|: (text, mean, how often)."""
    whole = tokens[tokens["token"] != ""]  # the rest are the later bytes of a character
    size = whole.assign(advantage=whole["advantage"].abs()).groupby("token")
    often = size["sigma"].count()
    often = often[often >= min(FEW, often.max())]

    def rows(name: str, ascending: bool) -> Iterator[list]:
        means = size[name].mean()[often.index].sort_values(ascending=ascending, kind="stable")
        return ([text, float(f"{mean:.4g}"), int(often[text])] for text, mean in means.head(length).items())

    return [
        {"title": f"{end} mean {shown}", "rows": list(rows(name, end == "Lowest"))}
        for name, shown in (("sigma", "sigma"), ("advantage", "|advantage|"))
        for end in ("Highest", "Lowest")
    ]


def by_sigma(tokens: pd.DataFrame) -> dict[str, list[float | None]]:
    """Mean |advantage| and entropy in each tenth of the tokens, from the lowest sigma to the highest."""
    ordered = tokens.sort_values("sigma", kind="stable")
    ordered = ordered.assign(advantage=ordered["advantage"].abs()).rename(columns={"advantage": "|advantage|"})
    tenth = np.arange(len(ordered)) * 10 // max(1, len(ordered))
    names = [name for name in ("|advantage|", "entropy") if name in ordered]
    means = ordered.groupby(tenth)[names].mean().reindex(range(10))
    return {name: _short(means[name]) for name in names}
