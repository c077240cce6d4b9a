"""What critics cost on one GPU, at the true shapes of Qwen3: ``python benchmarks/critic_cost.py``.

Time and peak memory of one optimizer step on a batch and of one evaluation of it, for a critic of 4B, two of 0.6B, two of
1.7B, and two of 4B against one of 14B. Each of M critics evaluates every row and trains on 1/M of them; weights are random.
Needs torch, transformers and this repository, not verl. Each case has a process of its own: one that runs out of memory
is reported as such, and the others go on. ``--device cpu`` runs a tiny shape, to see that the command works.

As in verl: fp32 weights and gradients under FSDP2, which hands each layer to the computation in bf16; gradient
checkpointing; micro-batches of whole rows up to a number of tokens; gradient clipping; AdamW. Unlike there, all rows have the
same length, so nothing is padded, all critics stay on the card, and AdamW is torch's fused one, which needs no memory of its
own. ``/bf16`` behind a case, for models whose fp32 states no card holds: weights and gradients in bf16, no AdamW.

The floor is what work (as ``recipe.asyppo.plan`` counts it, recomputation included) or memory traffic (without activations)
takes at the card's peak. The last line is one JSON object.
"""

import argparse
import dataclasses
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForTokenClassification, Qwen3Config
from transformers.utils import is_flash_attn_2_available

from recipe.asyppo.plan.model import BUILT_IN, Model
from recipe.asyppo.plan.settings import GIB, HARDWARE

PROMPT = 256  # tokens of a row before its response
SHAPES = {**BUILT_IN, "tiny": Model("tiny", 512, 64, 128, 2, 4, 2, 16, tied=True)}
# The names under which the SXM cards report themselves; PCIe and NVL cards have other peaks.
CARDS = {"NVIDIA H200": "h200", "NVIDIA H100 80GB HBM3": "h100", "NVIDIA A100-SXM4-80GB": "a100"}
PHASES = ["update", "evaluation"]
COLUMNS = ["s", "min", "max", "floor-s", "tokens/s", "TFLOP/s", "of-peak", "GiB"]


@dataclasses.dataclass(frozen=True)
class Case:
    """Critics of one size side by side (``4b``, ``2x0.6b``, ``14b/bf16``), and the rows they work on."""

    name: str
    model: Model
    count: int
    is_full: bool  # fp32 weights, gradients and AdamW; otherwise weights and gradients in bf16 and no optimizer step
    length: int = 4096  # response tokens of a row
    rows: int = 8
    tokens: int = 17_408  # most tokens of a micro-batch to train on; one to evaluate holds twice as many

    @classmethod
    def parse(cls, name: str) -> "Case":
        match = re.fullmatch(r"(?:([1-9]\d*)x)?([\w.]+?)(/bf16)?", name)
        if not match or match[2] not in SHAPES:
            sizes = ", ".join(SHAPES)
            raise argparse.ArgumentTypeError(
                f"{name!r} is no case; write SIZE, NxSIZE or NxSIZE/bf16 with one of {sizes}"
            )
        return cls(name, SHAPES[match[2]].as_critic(), int(match[1] or 1), not match[3])

    def micro_batches(self, phase: str, index: int) -> list[int]:
        """Rows of each micro-batch of critic ``index``: all rows to evaluate, every M-th to train on."""
        rows = self.rows if phase == "evaluation" else len(range(index, self.rows, self.count))
        most = self.tokens * (2 if phase == "evaluation" else 1) // (PROMPT + self.length)
        return [min(most, rows - start) for start in range(0, rows, most)]

    def floor(self, phase: str) -> tuple[float, float]:
        """Operations, and bytes moved, that a phase cannot do without.

        Bytes: bf16 weights in every pass over a micro-batch, one to evaluate and three to train, where gradients are read and
        written too; AdamW reads and writes weights and moments and reads gradients.
        """
        flops = moved = 0.0
        weights = self.model.params - self.model.embedding  # of the embedding only the rows in use have to move
        for index in range(self.count):
            batches = self.micro_batches(phase, index)
            tokens, squares = (sum(batches) * (PROMPT + self.length) ** power for power in (1, 2))
            if phase == "evaluation":
                flops += self.model.forward_flops(tokens, squares)
                moved += weights * 2 * len(batches)
            else:
                flops += self.model.training_flops(tokens, squares)
                gradients, adamw = (8, 28) if self.is_full else (4, 0)
                moved += weights * (6 + gradients) * len(batches) + self.model.params * adamw
        return flops, moved


def build(case: Case, device: str) -> nn.Module:
    """A value model with random weights, ready to train."""
    shape = case.model
    widths = {"hidden_size": shape.hidden, "intermediate_size": shape.intermediate, "head_dim": shape.head_dim}
    heads = {"num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads}
    counts = {"vocab_size": shape.vocab, "num_hidden_layers": shape.layers, "num_labels": 1}
    config = Qwen3Config(**widths, **heads, **counts, classifier_dropout=0.0, use_cache=False)
    attention = "flash_attention_2" if device == "cuda" and is_flash_attn_2_available() else "sdpa"
    dtype = torch.float32 if case.is_full else torch.bfloat16
    with torch.device(device):
        model = AutoModelForTokenClassification.from_config(config, dtype=dtype, attn_implementation=attention)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if case.is_full:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for module in [*model.model.layers, model]:
            fully_shard(module, mp_policy=policy)
    return model


def values_of(model: nn.Module, case: Case, rows: int, device: str) -> Tensor:
    """Values (B, T) of random tokens, on response positions."""
    ids_BT = torch.randint(0, case.model.vocab, (rows, PROMPT + case.length), device=device)
    return model(input_ids=ids_BT).logits.squeeze(-1)[:, PROMPT:].float()


def evaluate(models: Sequence[nn.Module], case: Case, device: str) -> None:
    """Every critic evaluates every row."""
    with torch.no_grad():
        for index, model in enumerate(models):
            model.eval()
            for rows in case.micro_batches("evaluation", index):
                values_of(model, case, rows, device)


def update(models: Sequence[nn.Module], adamw: Sequence[torch.optim.AdamW], case: Case, device: str) -> None:
    """One optimizer step of every critic on its share of the rows, towards random returns."""
    for index, model in enumerate(models):
        batches = case.micro_batches("update", index)
        model.train()
        for rows in batches:
            values_BT = values_of(model, case, rows, device)
            squares_BT = (values_BT - torch.randn_like(values_BT)).square()
            (0.5 * squares_BT.sum() / (sum(batches) * case.length)).backward()
        if case.is_full:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adamw[index].step()
        model.zero_grad()


def seconds_of(action: Callable[[], object], device: str) -> float:
    if device != "cuda":
        start = time.perf_counter()
        action()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    action()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def card(device: str) -> dict:
    """Name and peaks of the device: of a known card from its data sheet, of others what a large product and a copy reach."""
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    if name in CARDS:
        known = HARDWARE[CARDS[name]]
        return {"name": name, "peaks": "data sheet", "flops": known.flops, "bandwidth": known.bandwidth}
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    product = min(seconds_of(lambda: a @ b, device) for _ in range(10))
    copy = min(seconds_of(lambda: a.clone(), device) for _ in range(10))
    return {"name": name, "peaks": "measured", "flops": 2 * size**3 / product, "bandwidth": 2 * a.nbytes / copy}


def measure(case: Case, device: str, repeats: int) -> list[dict]:
    """A row for each phase, until one runs out of memory."""
    results: list[dict] = []
    try:
        models = [build(case, device) for _ in range(case.count)]
        adamw = [torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True) for model in models if case.is_full]
        # The update first: it makes the AdamW states, which an evaluation in training finds in memory.
        actions = [lambda: update(models, adamw, case, device), lambda: evaluate(models, case, device)]
        for phase, action in zip(PHASES, actions, strict=True):
            action()  # warm-up
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds = [seconds_of(action, device) for _ in range(repeats)]
            gib = torch.cuda.max_memory_allocated() / GIB if device == "cuda" else None
            results.append({"phase": phase, "all_seconds": seconds, "gib": gib})
    except torch.cuda.OutOfMemoryError:
        results.append({"phase": PHASES[len(results)], "error": "out of memory"})
    return results


def measure_apart(case: Case) -> list[dict]:
    """:func:`measure` in a process of its own; a failure of it is a result, not the end."""
    command = [sys.executable, __file__, *sys.argv[1:], "--cases", case.name, "--lengths", str(case.length), "--one"]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        print(run.stderr, file=sys.stderr)
        return [{"phase": "all", "error": f"exit code {run.returncode}, {run.stderr.splitlines()[-1:]}"}]
    return json.loads(run.stdout.splitlines()[-1])


def with_rates(case: Case, result: dict, peak: dict) -> dict:
    """A result of :func:`measure` with the floor and what follows from its seconds, in the order of COLUMNS."""
    row = {"case": case.name, "length": case.length, **result}
    if "error" in row:
        return row
    flops, moved = case.floor(row["phase"])
    seconds = statistics.median(row["all_seconds"])
    floor = max(flops / peak["flops"], moved / peak["bandwidth"])
    tokens, speed = case.rows * (PROMPT + case.length) / seconds, flops / seconds
    low, high = min(row["all_seconds"]), max(row["all_seconds"])
    figures = [seconds, low, high, floor, tokens, speed / 1e12, speed / peak["flops"], row.pop("gib")]
    return row | dict(zip(COLUMNS, figures, strict=True))


def read_arguments() -> tuple[argparse.Namespace, list[Case]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cases", type=Case.parse, nargs="+", help="default: 4b 2x0.6b 2x1.7b 2x4b/bf16 14b/bf16")
    parser.add_argument("--lengths", type=int, nargs="+", help="response tokens of a row; default: 4096 8192")
    parser.add_argument("--rows", type=int, default=Case.rows, help="rows in the batch")
    parser.add_argument("--tokens", type=int, default=Case.tokens, help="most tokens of a micro-batch to train on")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    on_cpu = arguments.device == "cpu"
    names = ["tiny", "2xtiny"] if on_cpu else ["4b", "2x0.6b", "2x1.7b", "2x4b/bf16", "14b/bf16"]
    cases = [
        dataclasses.replace(case, length=length, rows=arguments.rows, tokens=arguments.tokens)
        for length in arguments.lengths or ([128, 256] if on_cpu else [4096, 8192])
        for case in arguments.cases or map(Case.parse, names)
    ]
    longest, most = PROMPT + max(case.length for case in cases), max(case.count for case in cases)
    if longest > arguments.tokens:
        parser.error(f"--tokens {arguments.tokens} holds no row of {longest} tokens; raise it or lower --lengths")
    if most > arguments.rows:
        parser.error(f"--rows {arguments.rows} leaves one of {most} critics without a row; raise it")
    return arguments, cases


def main() -> None:
    arguments, cases = read_arguments()
    if arguments.one:
        dist.init_process_group(
            "gloo" if arguments.device == "cpu" else "nccl", store=dist.HashStore(), rank=0, world_size=1
        )
        print(json.dumps(measure(cases[0], arguments.device, arguments.repeats)))
        dist.destroy_process_group()
        return
    peak, rows = card(arguments.device), []
    print(f"{peak['name']}: {peak['flops'] / 1e12:.2f} TFLOP/s, {peak['bandwidth'] / 1e12:.2f} TB/s ({peak['peaks']})")
    print(f"{'case':<10} {'length':>6} {'phase':<10}", *(f"{column:>9}" for column in COLUMNS))
    for case in cases:
        for result in measure_apart(case):
            rows.append(row := with_rates(case, result, peak))
            figures = [f"{row[name]:>9,.4g}" for name in COLUMNS if row.get(name) is not None]
            print(f"{case.name:<10} {case.length:>6} {row['phase']:<10}", *figures, row.get("error", ""), flush=True)
    print(json.dumps({"card": peak, "torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
