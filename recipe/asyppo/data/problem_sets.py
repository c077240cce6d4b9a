"""The problem sets of the Qwen3 recipe, and where their rows come from: the hub, or local files."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import datasets

from recipe.asyppo.data.rows import READERS, Row, read_rows

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


@dataclass
class Sources:
    """Sources of the sets, in this order: files named on their own, folders with a file per set, the hub."""

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
            elif name in PROBLEM_SETS and file:
                raise ValueError(f"--source {word}: there is no file {file}")
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
            named = sorted(path for path in folder.iterdir() if path.name.lower().startswith(f"{name}."))
            files = [path for path in named if path.stem.lower() == name and path.suffix.lower() in READERS]
            if len(files) > 1:
                raise ValueError(f"--source {folder}: {files[0].name} and {files[1].name} are both {name}; keep one")
            if named:
                # Without one that can be read, the first says what is in the way.
                return (files or named)[0]
        if self.hub:
            return None
        looked = ", ".join(str(folder / name) for folder in self.folders) or "no folder"
        raise ValueError(
            f"no file for {name} ({looked} with {', '.join(READERS)}); give {name}=FILE to --source, add `hub` to it, or "
            "leave the set out with --sets and --against"
        )

    def load(self, name: str) -> tuple[list[Row], str]:
        """The rows of a set, and in words where they are from.

        Raises:
            ValueError: its file cannot be read.
        """
        row, path = PROBLEM_SETS[name], self.find(name)
        if path:
            return read_rows(path), os.fsencode(path.name).decode(errors="replace")
        data = datasets.load_dataset(row.hub, row.config, split=row.split, revision=row.revision)
        rows = data.select_columns([row.question, row.answer]).with_format("arrow")[:].to_pylist()
        return rows, f"{row.hub}@{row.revision[:7]}"
