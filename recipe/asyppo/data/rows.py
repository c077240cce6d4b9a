"""From a file to problems: its rows with every value as it is written, and the question and the answer of a row.

No library may guess a type on the way: numbers of JSON stay their text, and CSV holds nothing but text.
"""

import csv
import json
import math
import re
import sys
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from recipe.asyppo.reward.math_reward import last_boxed

Row = dict[str, Any]
# Fields of local files, whichever comes first with something in it. ``solution`` counts for its box only.
QUESTION_FIELDS = ("question", "problem", "prompt")
ANSWER_FIELDS = ("final_answer", "ground_truth", "answer", "solution")
FIELDS = (*QUESTION_FIELDS, *ANSWER_FIELDS)
NEXT = re.compile(r"\S")


class Unusable(ValueError):
    """The reason why a row is left out."""


def _row(pairs: Any) -> Row:
    pairs = list(pairs)
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"a field occurs twice among {[name for name, _ in pairs]}")
    return row


# AMC 2023 writes its answers, whole numbers, as 27.0.
JSON = json.JSONDecoder(parse_int=str, parse_float=lambda text: text.removesuffix(".0"), object_pairs_hook=_row)


def _read_json(path: Path) -> list[Row]:
    """Objects one after the other, on lines or not, or lists of them."""
    text, at = path.read_text(encoding="utf-8-sig"), 0
    rows: list[Row] = []
    while start := NEXT.search(text, at):
        value, at = JSON.raw_decode(text, start.start())
        for row in value if isinstance(value, list) else [value]:
            if not isinstance(row, dict):
                raise ValueError(f"value {len(rows) + 1} is not an object")
            rows.append({key: row[key] for key in FIELDS if key in row})
    return rows


def _read_csv(path: Path) -> list[Row]:
    csv.field_size_limit(sys.maxsize)
    with open(path, encoding="utf-8-sig", newline="") as file:
        header, *lines = [line for line in csv.reader(file, strict=True) if line] or [[]]
    for number, line in enumerate(lines, 1):
        if len(line) != len(header):
            raise ValueError(f"row {number} has {len(line)} values, the header has {len(header)}")
    return [_row(zip(header, line, strict=True)) for line in lines]


def _read_parquet(path: Path) -> list[Row]:
    with pq.ParquetFile(path) as file:
        table = file.read(columns=list(FIELDS))
    _row((name, None) for name in table.column_names)
    return table.to_pylist()


READERS = {".parquet": _read_parquet, ".jsonl": _read_json, ".json": _read_json, ".csv": _read_csv}


def read_rows(path: Path) -> list[Row]:
    """All rows of a file.

    Raises:
        ValueError: it cannot be read, or holds no row.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"--source: {path} is not one of {', '.join(READERS)}; unpack or convert it")
    try:
        rows = reader(path)
    except (OSError, ValueError, RecursionError, csv.Error, pa.ArrowException) as error:
        raise ValueError(f"--source: {path} cannot be read as {path.suffix[1:]}: {error}") from error
    if not rows:
        raise ValueError(f"--source: {path} holds no rows")
    return rows


def read_question(row: Mapping[str, Any]) -> str:
    """The question of a row; of a chat, the user's only message.

    Raises:
        Unusable: with the reason.
    """
    for key in QUESTION_FIELDS:
        value = row.get(key)
        if text := _text(_asked(value) if isinstance(value, list | dict) else value, "question"):
            return text
    raise Unusable("no question")


def _asked(chat: list | dict) -> str | None:
    messages = [chat] if isinstance(chat, dict) else chat
    match [part for part in messages if not (isinstance(part, dict) and part.get("role") == "system")]:
        case [{"role": "user", "content": str(text) | [{"type": "text", "text": str(text)}]}]:
            return text
        case []:
            return None
    raise Unusable("prompt is not one question of a user")


def read_answer(row: Mapping[str, Any], *, needs_marker: bool = False) -> str:
    """The answer of a row as it is written there; several are joined by commas.

    ``needs_marker``: a text of several words in ``answer`` is a solution, whose answer follows ``####`` (GSM8K).

    Raises:
        Unusable: with the reason.
    """
    for key in ANSWER_FIELDS:
        value = row.get(key)
        parts = value if isinstance(value, list) else [value]
        answers = [_final(_text(part, "answer"), key, needs_marker) for part in parts]
        if answers and all(answers):
            return ", ".join(answers)
        if any(answers):
            raise Unusable("one of several answers is empty")
    raise Unusable("no answer")


def _final(text: str, key: str, needs_marker: bool) -> str:
    """The part of a text that follows ``####``, or else its last box, or else, if it may be an answer, all of it."""
    if "####" in text:
        return text.rpartition("####")[2].strip()
    if "\\boxed" in text or key == "solution":
        return last_boxed(text) or ""
    if needs_marker and key == "answer" and len(text.split()) > 1:
        raise Unusable("no #### before the answer")
    return text


def _text(value: Any, name: str) -> str:
    """A value as it is written, without the white space around it; empty if there is none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if not isinstance(value, str | int | float | Decimal) or value in (math.inf, -math.inf):
        raise Unusable(f"{name} is neither text nor a number")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip()
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Unusable(f"{name} is not valid Unicode") from None
    return text
