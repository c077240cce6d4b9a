"""The problem sets of the Qwen3 recipe: where they are, which fields are read, and how a row becomes a problem."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets

from recipe.asyppo.reward.answer_text import last_boxed

# Hub, configuration after the colon, fixed revision, and the fields that hold question and answer there.
TRAIN = """
name           split  question  answer        hub[:configuration]                       revision
deepmath       train  question  final_answer  zwhe99/DeepMath-103K                      5cf055d1fe3d7a2eb19719ac020211469736ae44
math           train  problem   solution      DigitalLearningGmbH/MATH-lighteval        0530c78699ea5e8eb5530600900e1f328b48acad
gsm8k          train  question  answer        openai/gsm8k:main                         740312add88f781978c0658806c59bc2815b9866
"""
EVAL = """
name           split  question  answer        hub[:configuration]                       revision
aime24         test   problem   solution      math-ai/aime24                            83a7f387baaa524a8bda0022eac0541582297103
aime25         test   problem   answer        math-ai/aime25                            563bb8404243c5f09de6ec262f2db674fe5bce9b
math500        test   problem   answer        HuggingFaceH4/MATH-500                    6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be
olympiadbench  train  question  final_answer  Hothan/OlympiadBench:OE_TO_maths_en_COMP  91184b52131e7fc9455fef848035173aea8cc01a
minerva        test   question  answer        math-ai/minervamath                       ee46ddc498933b1977577953250ca5c66be64f96
amc23          test   question  answer        math-ai/amc23                             80815d37005feb82cd7f8fbc6901d5d3eff43057
"""


@dataclass(frozen=True)
class ProblemSet:
    """One line of the tables above; ``part`` is train or eval."""

    part: str
    name: str
    split: str
    question: str
    answer: str
    place: str
    revision: str

    @property
    def hub(self) -> str:
        return self.place.partition(":")[0]

    @property
    def config(self) -> str | None:
        return self.place.partition(":")[2] or None


PROBLEM_SETS = {
    row.name: row
    for part, table in (("train", TRAIN), ("eval", EVAL))
    for row in (ProblemSet(part, *line.split()) for line in table.strip().splitlines()[1:])
}

# Fields of local files, whichever comes first with something in it. ``solution`` counts for its box only.
QUESTION_FIELDS = ("question", "problem", "prompt")
ANSWER_FIELDS = ("final_answer", "ground_truth", "answer", "solution")
LOADERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}


@dataclass
class Sources:
    """Where to read sets from: files named on their own, then folders with a file per set, then the hub."""

    files: dict[str, Path] = field(default_factory=dict)
    folders: list[Path] = field(default_factory=list)
    hub: bool = False

    @classmethod
    def parse(cls, words: list[str]) -> "Sources":
        """``hub``, folders, and ``NAME=FILE`` for single sets.

        Raises:
            ValueError: a word is none of these, or a path does not exist.
        """
        found = cls()
        for word in words:
            name, _, file = word.partition("=")
            if word == "hub":
                found.hub = True
            elif name in PROBLEM_SETS and Path(file).is_file():
                found.files[name] = Path(file)
            elif Path(word).is_dir():
                found.folders.append(Path(word))
            else:
                raise ValueError(
                    f"--source {word}: not `hub`, not a folder, and not NAME=FILE of {', '.join(PROBLEM_SETS)}"
                )
        return found

    def find(self, name: str) -> Path | None:
        """The file of a set, or None where it comes from the hub.

        Raises:
            ValueError: no file has it, or several in a folder do.
        """
        if name in self.files:
            return self.files[name]
        for folder in self.folders:
            files = [folder / f"{name}{ending}" for ending in LOADERS if (folder / f"{name}{ending}").is_file()]
            if len(files) > 1:
                raise ValueError(f"--source {folder}: {files[0].name} and {files[1].name} are both {name}; keep one")
            if files:
                return files[0]
        if self.hub:
            return None
        looked = ", ".join(str(folder / name) for folder in self.folders) or "no folder"
        raise ValueError(
            f"no file for {name} ({looked} with {', '.join(LOADERS)}); give {name}=FILE to --source, add `hub` to it, or "
            "leave the set out with --sets and --against"
        )

    def load(self, name: str) -> tuple[datasets.Dataset, str]:
        """The rows of a set, and in words where they are from."""
        row, path = PROBLEM_SETS[name], self.find(name)
        if path is None:
            rows = datasets.load_dataset(row.hub, row.config, split=row.split, revision=row.revision)
            return rows.select_columns([row.question, row.answer]), f"{row.hub}@{row.revision[:7]}"
        try:
            rows = datasets.load_dataset(LOADERS[path.suffix], data_files=str(path), split="train")
        except datasets.exceptions.DatasetGenerationError as error:
            raise ValueError(
                f"--source: {path} cannot be read as {path.suffix[1:]}: {error.__cause__ or error}"
            ) from error
        return rows, path.name


def read_question(row: Mapping[str, Any]) -> str:
    """The question of a row; empty if there is none."""
    return next((text for key in QUESTION_FIELDS if (text := str(row.get(key) or "").strip())), "")


def read_answer(row: Mapping[str, Any]) -> str:
    """The answer of a row as it is written there; empty if there is none."""
    return next((text for key in ANSWER_FIELDS if (text := _answer(row.get(key), only_box=key == "solution"))), "")


def _answer(value: Any, *, only_box: bool) -> str:
    r"""A field as an answer: a list is joined by commas; in a text what follows ``####``, or else the last box, counts."""
    if isinstance(value, list):
        return ", ".join(filter(None, (_answer(item, only_box=only_box) for item in value)))
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    text = str(value).strip()
    if "####" in text:
        return text.rpartition("####")[2].strip()
    if "\\boxed" in text or only_box:
        return last_boxed(text) or ""
    return text
