"""Time and memory of the two selections at 2^20 to 2^26 tokens: ``python benchmarks/selection.py``.

Each size runs in a process of its own, on two threads, with a tenth of the tokens outside the responses. Memory is the
growth of the peak resident size beyond inputs and outputs. The last line is one JSON object, for the largest size.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

WIDTH = 8192


def measure(exponent: int, repeats: int) -> dict:
    """Median seconds for both selections, and bytes a token beyond inputs and outputs."""
    import torch

    from asyppo_verl.asyppo import keep_advantage, keep_entropy

    torch.set_num_threads(2)
    torch.manual_seed(0)
    rows = (1 << exponent) // WIDTH
    # bf16 values are the common case: sigma has few distinct values and many ties.
    sigma = torch.rand(rows, WIDTH).bfloat16().float()
    is_response = torch.rand(rows, WIDTH) < 0.9
    keep_advantage(sigma[:1], is_response[:1], fraction=0.2)

    outputs = 2 * sigma.numel()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        advantage = keep_advantage(sigma, is_response, fraction=0.2)
        entropy = keep_entropy(sigma, is_response, fraction=0.2)
        seconds.append(time.perf_counter() - start)
        dropped = int(0.2 * int(is_response.sum()))
        assert int((~advantage).sum()) == int((~entropy).sum()) == dropped
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "tokens": sigma.numel(),
        "seconds": round(statistics.median(seconds), 3),
        "spread_seconds": [round(min(seconds), 3), round(max(seconds), 3)],
        "extra_bytes_per_token": round(max(0, after - before - outputs) / sigma.numel(), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--exponents", type=int, nargs="+", default=[20, 22, 24, 26], help="log2 of the token counts")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.repeats)))
        return
    print(f"{'tokens':>12} {'seconds':>9} {'min':>8} {'max':>8} {'extra bytes/token':>18}")
    for exponent in arguments.exponents:
        command = [sys.executable, __file__, "--one", str(exponent), "--repeats", str(arguments.repeats)]
        result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        low, high = result["spread_seconds"]
        print(
            f"{result['tokens']:>12} {result['seconds']:>9.3f} {low:>8.3f} {high:>8.3f} {result['extra_bytes_per_token']:>18.2f}"
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
