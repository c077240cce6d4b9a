"""What critics cost on one GPU, at the true shapes of Qwen3: ``python benchmarks/critic_cost.py``.

Time and peak memory of one optimizer step on a batch and of one evaluation of it, for a critic of 4B, two of 0.6B, two of
1.7B, and two of 4B against one of 14B. Each of M critics evaluates every row and trains on 1/M of them; weights are random.
Needs torch, transformers and this repository, not verl. Each case has a process of its own and a limit in time: one that
fails is reported as such, and the others go on. ``--device cpu`` runs a tiny shape, to see that the command works.

As in verl: fp32 weights and gradients under FSDP2, which hands each layer to the computation in bf16, under autocast;
gradient checkpointing; micro-batches of whole rows up to a number of tokens, packed, with positions to tell them apart;
gradient clipping; AdamW. Unlike there, all rows have the same length, all critics stay on the card, and AdamW is torch's
fused one, which needs no memory of its own. ``/bf16`` behind a case, for models whose fp32 states no card holds: weights and
gradients in bf16, no AdamW. Options behind a case change one thing each
(``2x0.6b+nockpt+compile``; a number and k: so many thousand tokens a micro-batch; ``--help`` lists them).

The floor is what work (as ``recipe.asyppo.plan`` counts it, recomputation included) or memory traffic (without activations)
takes at the card's peak. ``warm-s`` is the first run, with what it compiles. ``check`` must agree between options: the norm
of the first gradients, and the size of the values. The last line is one JSON object.
"""

import argparse
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from critic_cases import ATTENTION, OPTIONS, PROMPT, Case
from critic_models import Batch, build, evaluate, kernels_of, update

from recipe.asyppo.plan.settings import GIB, HARDWARE

# The names under which the SXM cards report themselves; PCIe and NVL cards have other peaks.
CARDS = {"NVIDIA H200": "h200", "NVIDIA H100 80GB HBM3": "h100", "NVIDIA A100-SXM4-80GB": "a100"}
PHASES = ["update", "evaluation"]
COLUMNS = ["s", "min", "max", "floor-s", "tokens/s", "TFLOP/s", "of-peak", "GiB", "warm-s", "check"]


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


def measure(case: Case, device: str, repeats: int) -> None:
    """Print a line for each phase, until one runs out of memory."""
    phase = PHASES[0]
    try:
        torch.manual_seed(0)
        models, batch = build(case, device), Batch(case, device)
        fused = None if "foreach" in case.options else True
        adamw = [torch.optim.AdamW(model.parameters(), lr=1e-6, fused=fused) for model in models if case.is_full]
        # The update first: it makes the AdamW states, which an evaluation in training finds in memory.
        actions = [lambda: update(models, adamw, batch), lambda: evaluate(models, batch)]
        for phase, action in zip(PHASES, actions, strict=True):
            start = time.perf_counter()
            check = action()
            check = None if check is None else float(check)
            warm = time.perf_counter() - start
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds = [seconds_of(action, device) for _ in range(repeats)]
            gib = torch.cuda.max_memory_allocated() / GIB if device == "cuda" else None
            result = {"phase": phase, "all_seconds": seconds, "gib": gib, "warm": warm, "check": check}
            if "profile" in case.options:
                result["kernels"] = kernels_of(action, device)
            print(json.dumps(result), flush=True)
    except torch.cuda.OutOfMemoryError:
        print(json.dumps({"phase": phase, "error": "out of memory"}))


def start(case: Case) -> subprocess.Popen:
    """A process for a case, which imports what it needs and waits for a line."""
    command = [sys.executable, __file__, *sys.argv[1:], "--cases", case.name, "--lengths", str(case.length), "--one"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def kill(process: subprocess.Popen) -> None:
    """End a case's process and those that compile for it."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def finish(process: subprocess.Popen, limit: float) -> list[dict]:
    """:func:`measure` in ``process``; a failure of it is a result, not the end."""
    try:
        output, errors = process.communicate("go\n", timeout=limit)
        failure = f"exit code {process.returncode}, {errors.splitlines()[-1:]}" if process.returncode else ""
    except subprocess.TimeoutExpired:
        kill(process)
        output, errors = process.communicate()
        failure = f"stopped after {limit:g} s"
    results = [json.loads(line) for line in output.splitlines() if line.startswith('{"phase"')]
    if failure:
        print(errors[-3000:], file=sys.stderr)
        results.append({"phase": [*PHASES, "end"][len(results)], "error": failure})
    return results


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
    memory = [row.pop(name, None) for name in ("gib", "warm", "check")]
    figures = [seconds, low, high, floor, tokens, speed / 1e12, speed / peak["flops"], *memory]
    return row | dict(zip(COLUMNS, figures, strict=True))


def read_arguments() -> tuple[argparse.Namespace, list[Case]]:
    options = "".join(f"  +{name:<8} {meaning}\n" for name, meaning in OPTIONS.items())
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"options behind a case:\n{options}  +{', +'.join(ATTENTION)}: attention; +9k: 9,216 tokens a micro-batch",
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cases", type=Case.parse, nargs="+", help="default: 4b 2x0.6b 2x1.7b 2x4b/bf16 14b/bf16")
    parser.add_argument("--lengths", type=int, nargs="+", help="response tokens of a row; default: 4096 8192")
    parser.add_argument("--rows", type=int, default=Case.rows, help="rows in the batch")
    parser.add_argument("--tokens", type=int, default=Case.tokens, help="most tokens of a micro-batch to train on")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=90, help="seconds that a case may take")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    on_cpu = arguments.device == "cpu"
    names = ["tiny", "2xtiny"] if on_cpu else ["4b", "2x0.6b", "2x1.7b", "2x4b/bf16", "14b/bf16"]
    cases = [
        dataclasses.replace(
            case,
            length=length,
            rows=arguments.rows,
            tokens=arguments.tokens if case.tokens == Case.tokens else case.tokens,
        )
        for length in arguments.lengths or ([128, 256] if on_cpu else [4096, 8192])
        for case in arguments.cases or map(Case.parse, names)
    ]
    for case in cases:
        if PROMPT + case.length > case.tokens:
            parser.error(
                f"--tokens {case.tokens} holds no row of {PROMPT + case.length} tokens; raise it or lower --lengths"
            )
        if case.count > case.rows:
            parser.error(f"--rows {case.rows} leaves one of {case.count} critics without a row; raise it")
        if "stack" in case.options and case.rows % case.count:
            parser.error(f"--rows {case.rows} gives {case.count} stacked critics unequal shares; raise it by one")
    return arguments, cases


def print_row(row: dict, width: int) -> None:
    figures = [f"{row[name]:>9,.4g}" for name in COLUMNS if row.get(name) is not None]
    print(f"{row['case']:<{width}} {row['length']:>6} {row['phase']:<10}", *figures, row.get("error", ""), flush=True)
    if "kernels" in row:
        print("  ", {kind: round(seconds, 4) for kind, seconds in row["kernels"]["kinds"].items()})
        print(*(f"    {s:.4f} s {count:>6} {name}" for s, count, name in row["kernels"]["most"]), sep="\n", flush=True)


def table(cases: Sequence[Case], peak: dict, limit: float) -> list[dict]:
    """Measure the cases one after the other, each printed as it ends; told to stop, return what there is."""
    width, rows = max(len(case.name) for case in cases), []
    print(f"{'case':<{width}} {'length':>6} {'phase':<10}", *(f"{column:>9}" for column in COLUMNS))
    waiting = [start(cases[0])]
    try:
        for case, following in zip(cases, [*cases[1:], None], strict=True):
            # While a case is measured, the next one imports its packages.
            waiting += [start(following)] if following else []
            for result in finish(waiting[0], limit):
                rows.append(with_rates(case, result, peak))
                print_row(rows[-1], width)
            waiting.pop(0)
    except KeyboardInterrupt:
        print("stopped", flush=True)
    finally:
        for process in waiting:
            kill(process)
    return rows


def shares(rows: Sequence[dict]) -> list[dict]:
    """Each case's update and evaluation together, and its peak memory, over those of the first case of its length."""
    whole: dict[tuple[int, str], list[dict]] = {}
    for row in rows:
        whole.setdefault((row["length"], row["case"]), []).append(row)
    result: list[dict] = []
    first: dict[int, dict] = {}
    for (length, name), phases in whole.items():
        if [row["phase"] for row in phases] != PHASES or any("error" in row for row in phases):
            continue
        found = {"s": sum(row["s"] for row in phases), "GiB": max(row["GiB"] or 0 for row in phases)}
        base = first.setdefault(length, found)
        part = {f"of-{key}": value / base[key] if base[key] else None for key, value in found.items()}
        result.append({"case": name, "length": length, **found, **part})
    return result


def main() -> None:
    arguments, cases = read_arguments()
    if not arguments.one:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        peak = card(arguments.device)
        print(
            f"{peak['name']}: {peak['flops'] / 1e12:.2f} TFLOP/s, {peak['bandwidth'] / 1e12:.2f} TB/s ({peak['peaks']})"
        )
        rows = table(cases, peak, arguments.limit)
        print("\nseconds of both phases, peak GiB, and both over those of the first case")
        for share in shares(rows):
            print(*(f"{value:.3f}" if isinstance(value, float) else value for value in share.values()))
        print(json.dumps({"card": peak, "torch": torch.__version__, "rows": rows, "shares": shares(rows)}))
        return
    sys.stdin.readline()
    if arguments.device == "cuda":
        torch.cuda.set_device(0)
    backend = "gloo" if arguments.device == "cpu" else "nccl"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    measure(cases[0], arguments.device, arguments.repeats)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
