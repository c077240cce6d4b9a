r"""Build the training and evaluation sets of the Qwen3 recipe as verl parquet files.

    python -m recipe.asyppo.data.prepare_data --tokenizer Qwen/Qwen3-4B-Base                    # from the hub
    python -m recipe.asyppo.data.prepare_data --source FOLDER                                   # FOLDER/deepmath.jsonl, ...
    python -m recipe.asyppo.data.prepare_data --source FOLDER gsm8k=train.jsonl hub --sets gsm8k aime24

Every row of a source becomes a prompt or is counted under the reason why not. Training problems that are also evaluation
problems are left out. The same input and seed give the same files, byte for byte.
"""

import argparse
import json
import os
import random
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from recipe.asyppo.data.decontamination import Index, words
from recipe.asyppo.data.problem_sets import PROBLEM_SETS, Sources
from recipe.asyppo.data.rows import Row, Unusable, read_answer, read_question
from recipe.asyppo.reward.math_reward import LONGEST_ANSWER

TEMPLATES = {
    # What the model cards of Qwen ask for; the default.
    "boxed": "{question}\nPlease reason step by step, and put your final answer within \\boxed{}.",
    "plain": "{question}",
}
Chat = list[dict[str, str]]


@dataclass(frozen=True)
class Prompts:
    """The template of a prompt, and how long a prompt may be; without ``count`` any length will do."""

    template: str
    longest: int
    count: Callable[[Chat], int] | None = None

    def make(self, question: str) -> tuple[Chat, int | None]:
        """The chat, and its length in tokens if they are counted.

        Raises:
            Unusable: it is too long.
        """
        chat = [{"role": "user", "content": self.template.replace("{question}", question)}]
        length = self.count(chat) if self.count else None
        if length is not None and length > self.longest:
            raise Unusable(f"prompt longer than {self.longest} tokens")
        return chat, length


@dataclass
class Prepared:
    """A set and its rows: ``read`` = the kept rows + the sum of ``dropped``."""

    name: str
    source: str
    read: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    lengths: list[int | None] = field(default_factory=list)

    def sample(self, count: int, seed: int) -> None:
        """Keep ``count`` rows at random, in their order, if there are more."""
        if count >= len(self.rows):
            return
        # The name keeps the choices of two sets independent of each other.
        chosen = sorted(random.Random(f"{seed} {self.name}").sample(range(len(self.rows)), count))
        self.dropped["not in the sample"] = len(self.rows) - count
        self.rows = [self.rows[place] for place in chosen]
        self.lengths = [self.lengths[place] for place in chosen]

    def summary(self) -> dict[str, Any]:
        """The figures of the set, for the table and ``summary.json``."""
        lengths = [length for length in self.lengths if length is not None]
        return {
            "source": self.source,
            "read": self.read,
            "kept": len(self.rows),
            "dropped": dict(sorted(self.dropped.items())),
            "prompt_tokens": {"median": statistics.median(lengths), "longest": max(lengths)} if lengths else None,
        }


def token_counter(tokenizer_path: str) -> Callable[[Chat], int]:
    """A function that gives the length of a chat prompt in tokens, as verl's data set counts it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    if tokenizer.chat_template is None:
        raise ValueError(f"--tokenizer {tokenizer_path}: it has no chat template, which verl needs; use one that has")
    return lambda chat: len(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))


def prepare_set(name: str, sources: Sources, prompts: Prompts, against: Index | None) -> Prepared:
    """Read one set and keep what can be used, in the order of the source; ``against`` holds problems to leave out."""
    rows, source = sources.load(name)
    done, seen = Prepared(name, source, read=len(rows)), set[str]()
    for index, row in enumerate(tqdm(rows, desc=f"{name:>13}", unit=" rows", mininterval=0.5)):
        try:
            question, answer = _problem(row, name, seen, against)
            prompt, length = prompts.make(question)
        except Unusable as reason:
            done.dropped[str(reason)] += 1
            continue
        # The fields are the same in all sets: verl concatenates the files.
        reward_model = {"style": "rule", "ground_truth": answer}
        extra = {"split": PROBLEM_SETS[name].part, "index": index, "source": source, "question": question}
        done.rows.append(
            {
                "data_source": name,
                "prompt": prompt,
                "ability": "math",
                "reward_model": reward_model,
                "extra_info": extra,
            }
        )
        done.lengths.append(length)
    return done


def _problem(row: Row, name: str, seen: set[str], against: Index | None) -> tuple[str, str]:
    """Question and answer of a row; adds the question to ``seen``.

    Raises:
        Unusable: the reason why it is left out.
    """
    question, answer = read_question(row), read_answer(row, needs_marker=name == "gsm8k")
    if len(answer) > LONGEST_ANSWER:
        raise Unusable(f"answer longer than {LONGEST_ANSWER} characters")
    key = " ".join(words(question))
    if key in seen:
        raise Unusable("repeated in the set")
    seen.add(key)
    if against and (match := against.find(question)):
        raise Unusable(f"{match[0]} as in {match[1]}")
    return question, answer


def _questions(name: str, sources: Sources) -> Iterator[tuple[str, str]]:
    for row in sources.load(name)[0]:
        with suppress(Unusable):
            yield name, read_question(row)


def table(figures: dict[str, dict[str, Any]]) -> str:
    """The summary as a Markdown table."""
    lines = ["| set | source | rows | kept | prompt tokens: median, longest | left out |", "|---|---|---|---|---|---|"]
    for name, row in figures.items():
        lengths = row["prompt_tokens"]
        shown = f"{lengths['median']:g}, {lengths['longest']}" if lengths else "not counted"
        dropped = ", ".join(f"{count} {reason}" for reason, count in row["dropped"].items()) or "none"
        lines.append(f"| {name} | {row['source']} | {row['read']} | {row['kept']} | {shown} | {dropped} |")
    return "\n".join(lines)


def write(out: Path, prepared: list[Prepared], settings: dict[str, Any]) -> dict[str, Any]:
    """Write the parquet files and ``summary.json`` under other names, then rename them; files of other sets stay."""
    summary_path = out / "summary.json"
    old = json.loads(summary_path.read_text())["sets"] if summary_path.exists() else {}
    new = {done.name: done.summary() | {"settings": settings} for done in prepared}
    summary = {"sets": {name: (old | new)[name] for name in PROBLEM_SETS if name in old | new}}
    targets = []
    for done in prepared:
        target = out / PROBLEM_SETS[done.name].part / f"{done.name}.parquet"
        target.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(done.rows), target.with_suffix(".partial"))
        targets.append(target)
    summary_path.with_suffix(".partial").write_text(json.dumps(summary, indent=2) + "\n")
    for target in [*targets, summary_path]:
        os.replace(target.with_suffix(".partial"), target)
    return new


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    evaluation = [name for name, row in PROBLEM_SETS.items() if row.part == "eval"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--source", nargs="+", default=["hub"], help="hub, folders with NAME.jsonl/json/parquet/csv, NAME=FILE")
    add("--out", type=Path, default=Path("data/asyppo"), help="gets train/, eval/ and summary.json")
    names = list(PROBLEM_SETS)
    add("--sets", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    against = "evaluation sets whose problems are kept out of training"
    add("--against", nargs="*", choices=evaluation, default=evaluation, metavar="NAME", help=against)
    add("--deepmath-sample", type=int, default=5000, help="problems of DeepMath-103K; 0 keeps all")
    add("--seed", type=int, default=0, help="of the sample")
    add("--template", default="boxed", help="boxed, plain, or a text with {question} in it")
    add("--tokenizer", help="model whose tokenizer counts prompts; without it no prompt is too long")
    add("--max-prompt-length", type=int, default=1024, help="tokens, as data.max_prompt_length")
    arguments = parser.parse_args(words)
    arguments.template = TEMPLATES.get(arguments.template, arguments.template)
    if "{question}" not in arguments.template:
        parser.error(f"--template {arguments.template!r}: it needs {{question}}, or be one of {', '.join(TEMPLATES)}")
    return arguments


def prepare_all(arguments: argparse.Namespace) -> list[Prepared]:
    """All chosen sets.

    Raises:
        ValueError: a source cannot be read, or nothing of a set is left.
    """
    sources = Sources.parse(arguments.source)
    count = token_counter(arguments.tokenizer) if arguments.tokenizer else None
    prompts = Prompts(arguments.template, arguments.max_prompt_length, count)
    training = [name for name in arguments.sets if PROBLEM_SETS[name].part == "train"]
    others = arguments.against if training else []
    against = Index(pair for name in others for pair in _questions(name, sources))
    prepared = []
    for name in arguments.sets:
        done = prepare_set(name, sources, prompts, against if name in training else None)
        if name == "deepmath" and arguments.deepmath_sample:
            done.sample(arguments.deepmath_sample, arguments.seed)
        assert done.read == len(done.rows) + done.dropped.total()
        if not done.rows:
            raise ValueError(f"{name}: none of the {done.read} rows of {done.source} is left: {dict(done.dropped)}")
        prepared.append(done)
    return prepared


def main(words: list[str] | None = None) -> None:
    arguments = parse_arguments(words)
    settings = {
        key: getattr(arguments, key) for key in ("seed", "template", "tokenizer", "max_prompt_length", "against")
    }
    print(table(write(arguments.out, prepare_all(arguments), settings)))
    if not arguments.tokenizer:
        print(
            "prompt lengths were not checked: give --tokenizer, or let verl drop long prompts (data.filter_overlong_prompts)"
        )


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"prepare_data: {error}")
