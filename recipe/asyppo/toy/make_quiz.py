"""Make the quiz: the study's task ``tool`` for verl, with an environment that marks every answer before it asks on. One minute.

A prompt is 16 symbols and the first of them again, which is the first question: ``s7 s40 ... s7``. The model answers with a
digit, the environment says ``right s40`` or ``wrong s40`` and so asks the next, and so on (:mod:`recipe.asyppo.toy.quiz_loop`).
Actor and critics start from language models that have read such dialogues, errors included.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from recipe.asyppo.study.tasks import DIGITS, FIRST_SYMBOL, TASKS, Task
from recipe.asyppo.toy.make_spelling import INIT, optimize
from recipe.asyppo.toy.make_toy import CHAT_TEMPLATE, all_or_nothing, model_config, write_pairs

QUIZ = replace(TASKS["tool"], symbols=512)
SIZES = {
    "actor": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2},
    "critic": {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 1},
}
END = "<end>"
CHAT = ["\n", "<|im_start|>", "<|im_end|>"]
"""Never written; verl's agent loops look for them in the tokenizer of a Qwen model."""


def build_tokenizer(task: Task) -> PreTrainedTokenizerFast:
    """One token a word; the numbers of the tokens are the study's."""
    words = [END, "wrong", "right", *map(str, range(10)), *(f"s{k}" for k in range(task.symbols)), *CHAT]
    numbers = {word: token for token, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        additional_special_tokens=CHAT[1:],
        chat_template=CHAT_TEMPLATE,
    )


def dialogues(task: Task, symbols_BN: Tensor) -> tuple[Tensor, Tensor]:
    """Prompts (B, N + 1), and responses (B, 3 N - 2) as the start gives them: answer, mark, question, ..., answer."""
    marked_BN2 = task.demonstrate(symbols_BN).unflatten(1, (-1, 2))
    turns_BT = torch.cat([marked_BN2[:, :-1], symbols_BN[:, 1:, None]], 2).flatten(1)
    return torch.cat([symbols_BN, symbols_BN[:, :1]], 1), torch.cat([turns_BT, marked_BN2[:, -1, :1]], 1)


def make_reader(folder: Path, name: str, steps: int, seed: int) -> None:
    """Write ``name/``, a language model that has read dialogues."""
    tokenizer = build_tokenizer(QUIZ)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Qwen3ForCausalLM(model_config(SIZES[name] | INIT, tokenizer))
    for learn in optimize(model, steps, f"{name} reads", lr=5e-3):
        prompts, responses = dialogues(QUIZ, QUIZ.draw_prompts(64, generator))
        logits = model(torch.cat([prompts, responses[:, :-1]], 1)).logits[:, QUIZ.answers :]
        learn(F.cross_entropy(logits.flatten(0, 1), responses.flatten()))
    model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)


def make(folder: Path, steps: int) -> None:
    """Write ``actor/``, ``critic/``, ``train.parquet``, ``test.parquet`` and ``loops.yaml``; all or nothing."""
    with all_or_nothing(folder) as partial:
        torch.set_num_threads(2)
        for seed, name in enumerate(SIZES):
            make_reader(partial, name, steps, seed)
        symbols_BN = QUIZ.draw_prompts(2064, torch.Generator().manual_seed(len(SIZES)))
        right_BN = QUIZ.right_tokens(symbols_BN)
        pairs = [
            (" ".join(f"s{k}" for k in [*symbols, symbols[0]]), " ".join(map(str, right)))
            for symbols, right in zip((symbols_BN - FIRST_SYMBOL).tolist(), (right_BN - DIGITS).tolist(), strict=True)
        ]
        write_pairs(partial, "toy_quiz", pairs, test=64)
        (partial / "loops.yaml").write_text("- name: quiz\n  _target_: recipe.asyppo.toy.quiz_loop.QuizLoop\n")
        (partial / "made.json").write_text(json.dumps({"steps": steps}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write; kept as it is when already complete")
    parser.add_argument("--steps", type=int, default=600, help="that each model reads 64 dialogues in")
    arguments = parser.parse_args()
    made = arguments.folder / "made.json"
    if not made.exists():
        make(arguments.folder, arguments.steps)
    elif (steps := json.loads(made.read_text())["steps"]) != arguments.steps:
        parser.error(
            f"the models in {arguments.folder} have read for {steps} steps; name another folder, or --steps {steps}"
        )
    print(f"the task is in {arguments.folder}")


if __name__ == "__main__":
    main()
