"""What a step that is kept for the token view costs the driver: ``python benchmarks/inspection.py``.

Times the writing of a step with ``asyppo.inspect.groups=2`` prompts of 16 responses of 8192 tokens and two mini-critics, out
of a batch of 512 prompts, and counts the bytes. TransferQueue is a memory that hands out copies. ``share`` is what it adds
to a step of ``--step-seconds``, every ``--every`` steps. The last line is one JSON object.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("VERL_PLATFORM", "cpu")

import torch
from tensordict import TensorDict
from transfer_queue import KVBatchMeta

from asyppo_verl import batch_io, inspection
from recipe.asyppo.toy.make_toy import build_tokenizer

RESPONSES = 16


def nested(vectors: list[torch.Tensor]) -> torch.Tensor:
    """Rows as TransferQueue has them."""
    return torch.nested.as_nested_tensor(vectors, layout=torch.jagged)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=512, help="of the batch")
    parser.add_argument("--groups", type=int, default=2, help="of them that are kept")
    parser.add_argument("--length", type=int, default=8192, help="of a response")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--step-seconds", type=float, default=200.0, help="of a step without keeping anything")
    parser.add_argument("--every", type=int, default=1, help="asyppo.inspect.every")
    options = parser.parse_args()

    keys = sorted(f"{prompt:032x}_{session}_0" for prompt in range(options.prompts) for session in range(RESPONSES))
    kept = keys[: options.groups * RESPONSES]
    tokens, count = options.length * len(keys), options.length
    tokenizer = build_tokenizer()
    text = tokenizer.encode("So 12 + 30 = 42, 因此答案是 \\boxed{42}. الجواب هو ٤٢. ", add_special_tokens=False)
    ids = torch.tensor(text * (count // len(text) + 1))[:count]
    rows = {
        "prompts": nested([torch.randint(0, 128, (200,)) for _ in kept]),
        "responses": nested([ids.roll(row) for row in range(len(kept))]),
        "rm_scores": nested([torch.zeros(count) for _ in kept]),
        "entropy": nested([torch.rand(count) for _ in kept]),
    }
    memory: Any = SimpleNamespace(
        kv_batch_get=lambda keys, partition_id, select_fields: (
            TensorDict(rows, len(kept)).select(*select_fields).clone()
        )
    )
    batch_io.tq = memory
    batch = KVBatchMeta(partition_id="train", keys=keys, tags=[{}] * len(keys))
    batch.fields = list(rows)
    fields = {"response_mask": torch.ones(tokens, dtype=torch.int64), "advantages": torch.randn(tokens)}
    responses = batch_io.Responses(keys, torch.arange(0, tokens + 1, count), fields)
    sigma = torch.rand(tokens)
    keep = {"keep_adv_N": sigma > 0.2, "keep_ent_N": sigma < 0.8}
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for step in range(options.repeats):
            start = time.perf_counter()
            inspection.write(
                Path(folder), step, batch, tokenizer, groups=options.groups, responses=responses,
                values_MN=torch.stack([sigma, sigma]), sigma_N=sigma, **keep,
            )  # fmt: skip
            seconds.append(time.perf_counter() - start)
        size = max(file.stat().st_size for file in Path(folder).iterdir())
    median = statistics.median(seconds)
    result = {
        "tokens": count * len(kept),
        "seconds": round(median, 3),
        "spread": [round(min(seconds), 3), round(max(seconds), 3)],
        "bytes_a_token": round(size / (count * len(kept)), 1),
        "share": round(median / options.every / options.step_seconds, 5),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
