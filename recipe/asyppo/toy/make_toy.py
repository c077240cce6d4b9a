"""Make the toy task: byte-level tokenizer, small Qwen3 actor and critic, two-digit additions as verl parquet files.

Everything is made here in about a minute on two cores; nothing is downloaded. The actor is trained by supervised steps
until it solves about a third of the problems, so that reinforcement learning has something to improve.
"""

import contextlib
import json
import random
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
SIZES = {
    # About 0.9 and 0.1 million parameters. vLLM's CPU attention wants heads of 32 or more.
    "actor": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4},
    "critic": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2},
}


def build_tokenizer(size: int = 0) -> PreTrainedTokenizerFast:
    """One token a byte, so that any text can be encoded; the chat template joins the messages as they are.

    Tokens that no text becomes fill a vocabulary up to ``size``.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    unused = [f"<{index}>" for index in range(size - len(alphabet) - len(SPECIAL_TOKENS))]
    vocabulary = {token: index for index, token in enumerate([*alphabet, *unused, *SPECIAL_TOKENS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL_TOKENS[1:],
        chat_template=CHAT_TEMPLATE,
    )


def build_model(shape: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """A randomly initialised Qwen3 of a shape such as those in :data:`SIZES`."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(model_config(shape, tokenizer))


def model_config(settings: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    """The configuration of a Qwen3 with these settings, such as a shape."""
    config = {
        "vocab_size": len(tokenizer),
        "head_dim": 32,
        "num_key_value_heads": settings["num_attention_heads"],
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "architectures": ["Qwen3ForCausalLM"],
    }
    return Qwen3Config(**{**config, **settings})


def problems(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """``count`` different (prompt, answer) pairs such as ("23+58=", "81")."""
    pairs = rng.sample([(a, b) for a in range(10, 100) for b in range(10, 100)], count)
    return [(f"{a}+{b}=", str(a + b)) for a, b in pairs]


def _batch(tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """Right-padded sequences whose labels are the answer and the end token."""
    rows = [
        (tokenizer(prompt).input_ids, [*tokenizer(answer).input_ids, tokenizer.eos_token_id])
        for prompt, answer in pairs
    ]
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    input_ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), -100)
    for row, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        input_ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return {"input_ids": input_ids, "labels": labels}


@torch.no_grad()
def accuracy(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]) -> float:
    """Mean probability of sampling exactly the right answer, which is the reward that PPO will start from."""
    batch = _batch(tokenizer, pairs)
    log_probs = model(batch["input_ids"]).logits[:, :-1].log_softmax(-1)
    labels = batch["labels"][:, 1:]
    chosen = log_probs.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return float((chosen * (labels != -100)).sum(-1).exp().mean())


def pretrain(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, *, until: float, max_steps: int, seed: int, name: str
) -> float:
    """Supervised steps until the accuracy on fixed problems reaches ``until``; returns that accuracy."""
    rng, check = random.Random(seed), problems(random.Random(seed + 1), 256)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    reached = 0.0
    bar = tqdm(range(1, max_steps + 1), desc=f"supervised start of the {name}", mininterval=1)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, step / 50)
        loss = model(**_batch(tokenizer, problems(rng, 128))).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 10 == 0:
            reached = accuracy(model, tokenizer, check)
            bar.set_postfix(accuracy=f"{reached:.2f}")
            if reached >= until:
                break
    bar.close()
    return reached


def write_data(folder: Path, *, seed: int, train: int = 6000, test: int = 256) -> None:
    """Training and test problems, disjoint, in verl's parquet schema."""
    write_pairs(folder, "toy_addition", problems(random.Random(seed), train + test), test=test)


def write_pairs(folder: Path, source: str, pairs: list[tuple[str, str]], *, test: int) -> None:
    """Prompts and answers as ``train.parquet`` and, the last ``test`` of them, ``test.parquet``."""
    for name, part in (("train", pairs[:-test]), ("test", pairs[-test:])):
        rows = [
            {
                "data_source": source,
                "prompt": [{"role": "user", "content": prompt}],
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": answer},
                "extra_info": {"split": name, "index": index},
            }
            for index, (prompt, answer) in enumerate(part)
        ]
        pd.DataFrame(rows).to_parquet(folder / f"{name}.parquet")


@contextlib.contextmanager
def all_or_nothing(folder: Path) -> Iterator[Path]:
    """A new folder to write into, which takes the place of ``folder`` once all is written; only one of ours is replaced."""
    if folder.exists() and not (folder / "made.json").exists() and any(folder.iterdir()):
        raise SystemExit(f"error: {folder} holds something else than a task; choose a new folder (TOY_DIR)")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def make(folder: Path, *, until: float = 0.35, max_steps: int = 3000, seed: int = 0, head_dim: int = 32) -> None:
    """Write ``actor/``, ``critic/``, ``train.parquet`` and ``test.parquet``; an interrupted run leaves nothing behind."""
    with all_or_nothing(folder) as partial:
        tokenizer = build_tokenizer()
        summary = {}
        for index, (name, target) in enumerate((("actor", until), ("critic", 1.0))):
            model = build_model(SIZES[name] | {"head_dim": head_dim}, tokenizer, seed + index)
            steps = max_steps if name == "actor" else min(200, max_steps)
            summary[name] = pretrain(model, tokenizer, until=target, max_steps=steps, seed=seed + 10 * index, name=name)
            model.save_pretrained(partial / name)
            tokenizer.save_pretrained(partial / name)
        write_data(partial, seed=seed)
        (partial / "made.json").write_text(json.dumps({"seed": seed, "start_accuracy": summary}, indent=2))
