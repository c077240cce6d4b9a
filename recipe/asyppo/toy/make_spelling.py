"""Make the demo's task: spell three digits, "407=" -> "four zero seven". Actor, two mini-critics and data, in 1 to 3 minutes.

The actor learns from a text in which every other answer was typed without care, so it makes mistakes, which can be seen as
soon as they are made. Each critic sees graded answers of that actor before the run (value pre-training; with ``--answers 0``
it has read the text instead): answers of its own, sampled here, from which it learns what they will be worth and, for its
body, how they go on. The critics have nothing in common, neither weights nor data: with a common body they agree where they
know nothing, at the start of a response, and the masks would take those tokens.
"""

import argparse
import json
import multiprocessing
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM, Qwen3ForTokenClassification
from transformers.utils.logging import disable_progress_bar

from recipe.asyppo.toy.make_toy import SIZES, all_or_nothing, build_tokenizer, model_config, write_pairs

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
PROMPT, LONGEST = 4, 20
"""Tokens, which are letters, of a prompt, and of a response at most."""

INIT = {"initializer_range": 0.06}  # models this narrow hardly learn from weights as small as Qwen3's


@dataclass(frozen=True)
class Settings:
    """How much is learned here."""

    careless: float = 0.55  # share of the answers that were typed without care
    typos: float = 0.35  # of whose letters so many are wrong
    actor_steps: int = 110
    answers: int = 12288  # that each critic sees graded; 0: it has read the text, as the actor has
    passes: int = 3  # over the answers
    critic_steps: int = 576  # of critics that read the text
    seed: int = 0


class Spelling:
    """All prompts (1000, PROMPT) and right answers (1000, LONGEST), filled with end tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.end = tokenizer.eos_token_id
        self.pairs = [(f"{n:03}=", " ".join(WORDS[int(digit)] for digit in f"{n:03}")) for n in range(1000)]
        self.prompts = torch.tensor([tokenizer(prompt).input_ids for prompt, _ in self.pairs])
        answers = [tokenizer(answer).input_ids for _, answer in self.pairs]
        self.answers = torch.tensor([answer + [self.end] * (LONGEST - len(answer)) for answer in answers])
        self.letters = torch.tensor(tokenizer("abcdefghijklmnopqrstuvwxyz").input_ids)

    def typed(self, rows: Tensor, careless: float, typos: float) -> Tensor:
        """Answers as they stand in the text that the actor learns from."""
        answers = self.answers[rows]
        is_typo = (torch.rand(answers.shape) < typos) & (torch.rand(len(rows), 1) < careless) & (answers != self.end)
        return torch.where(is_typo, self.letters[torch.randint(26, answers.shape)], answers)

    def is_response(self, answers: Tensor) -> Tensor:
        """True up to the first end token, which counts."""
        is_end = answers == self.end
        return is_end.cumsum(1) - is_end.long() == 0


def optimize(model: nn.Module, steps: int, name: str = "", *, lr: float = 2e-3) -> Iterator[Callable[[Tensor], None]]:
    """Yield a function that makes an optimizer step on a loss, for so many steps; the learning rate rises, then falls to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    for step in tqdm(range(steps), desc=name, mininterval=1, disable=not name):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 20, 2 * (1 - step / steps))

        def learn(loss: Tensor) -> None:
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        yield learn


def make_reader(folder: Path, name: str, size: str, steps: int, seed: int, settings: Settings) -> None:
    """Write ``name/``, a language model that has read the text."""
    tokenizer = build_tokenizer()
    task = Spelling(tokenizer)
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(model_config(SIZES[size] | INIT, tokenizer))
    for learn in optimize(model, steps, f"{name} reads"):
        rows = torch.randint(len(task.prompts), (64,))
        answers = task.typed(rows, settings.careless, settings.typos)
        logits = model(torch.cat([task.prompts[rows], answers[:, :-1]], 1)).logits[:, PROMPT - 1 :]
        is_response = task.is_response(answers)
        learn(F.cross_entropy(logits[is_response], answers[is_response]))
    model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)


@torch.no_grad()
def sample(actor: Qwen3ForCausalLM, task: Spelling, rows: Tensor) -> Tensor:
    """An answer to each of these prompts, up to its end token and filled with more of them."""
    tokens, cache, answers = task.prompts[rows], None, []
    for _ in range(LONGEST):
        output = actor(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, tokens = output.past_key_values, output.logits[:, -1].softmax(-1).multinomial(1)
        answers.append(tokens)
    drawn = torch.cat(answers, 1)
    return torch.where(task.is_response(drawn), drawn, task.end)


def make_critic(folder: Path, index: int, settings: Settings) -> float | None:
    """Write the critic of this number, pre-trained on answers of its own; returns the reward of these, if it has any."""
    name, seed = "critic" if index == 0 else f"critic_{index}", settings.seed + 1 + index
    if not settings.answers:
        make_reader(folder, name, "critic", settings.critic_steps, seed, settings)
        return None
    tokenizer = build_tokenizer()
    task, actor = Spelling(tokenizer), Qwen3ForCausalLM.from_pretrained(folder / "actor")
    torch.manual_seed(seed)
    rows = torch.randint(len(task.prompts), (settings.answers,))
    show = not index  # both do the same at the same time
    batches = tqdm(rows.split(512), desc="answers of the actor", mininterval=1, disable=not show)
    answers = torch.cat([sample(actor, task, batch) for batch in batches])
    rewards = (answers == task.answers[rows]).all(1).float()

    config = model_config(SIZES["critic"] | INIT | {"num_labels": 1, "classifier_dropout": 0.0}, tokenizer)
    critic, next_token = Qwen3ForTokenClassification(config), nn.Linear(config.hidden_size, config.vocab_size)
    order = torch.cat([torch.randperm(len(rows)) for _ in range(settings.passes)]).split(64)
    steps = optimize(nn.ModuleList([critic, next_token]), len(order), "value pre-training" if show else "")
    for learn, batch in zip(steps, order, strict=True):
        # The value of a token is that of the text before it, as in PPO.
        text = torch.cat([task.prompts[rows[batch]], answers[batch, :-1]], 1)
        hidden = critic.model(text).last_hidden_state[:, PROMPT - 1 :][is_response := task.is_response(answers[batch])]
        error = critic.score(hidden)[:, 0] - rewards[batch, None].expand_as(is_response)[is_response]
        learn(error.square().mean() + 0.1 * F.cross_entropy(next_token(hidden), answers[batch][is_response]))
    critic.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    return float(rewards.mean())


def _be_quiet() -> None:
    # One thread each: threads that wait for each other take ten times as long beside another program.
    torch.set_num_threads(1)
    disable_progress_bar()


def make(folder: Path, settings: Settings) -> None:
    """Write ``actor/``, ``critic/``, ``critic_1/``, ``train.parquet`` and ``test.parquet``; all or nothing."""
    with all_or_nothing(folder) as partial:
        with ProcessPoolExecutor(2, multiprocessing.get_context("fork"), _be_quiet) as pool:
            pool.submit(make_reader, partial, "actor", "actor", settings.actor_steps, settings.seed, settings).result()
            rewards = list(pool.map(make_critic, [partial] * 2, range(2), [settings] * 2))
        pairs = Spelling(build_tokenizer()).pairs
        random.Random(settings.seed).shuffle(pairs)
        write_pairs(partial, "toy_spelling", pairs, test=40)
        (partial / "made.json").write_text(json.dumps({**asdict(settings), "reward": rewards}, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write; kept as it is when already complete")
    parser.add_argument(
        "--answers", type=int, default=Settings.answers, help="graded ones that each critic sees before"
    )
    options = parser.parse_args()
    folder, made = options.folder, options.folder / "made.json"
    if not made.exists():
        make(folder, Settings(answers=options.answers))
    elif (answers := json.loads(made.read_text())["answers"]) != options.answers:
        parser.error(
            f"the critics in {folder} have seen {answers} answers, not --answers {options.answers}; name another folder"
        )
    print(f"the task is in {folder}")


if __name__ == "__main__":
    main()
