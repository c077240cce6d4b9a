"""Time and memory that AsyPPO adds to the driver's step: ``python benchmarks/driver_overhead.py``.

The trainer's own hooks run on 2^20 to 2^26 response tokens (the largest: 512 prompts x 16 responses x 8192), each size in
a process of its own, on two threads. What is not ours does nothing: verl's trainer, the workers, and TransferQueue, in
whose place a memory hands out copies and takes fields without keeping them. With ``--transfer-queue`` the fields go
through verl's real TransferQueue instead.

``seconds`` is the time of the hooks without the queue's calls, ``cpu_seconds`` their processor time, which other work on
the machine changes less, ``queue_seconds`` the time of the queue's calls. ``peak_gib`` is the highest growth of the
process's resident memory in a step: the fields that the hooks fetch, everything they make of them and everything kept
from one hook to the next. The last line is one JSON object.
"""

import argparse
import contextlib
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("VERL_PLATFORM", "cpu")

WIDTH, RESPONSES = 8192, 16
LIMIT = 12 << 30  # bytes
STAGES = ["shards and padding", "values", "advantages", "critic updates"]


class Queue:
    """TransferQueue's client, or what stands in its place, with a stopwatch."""

    def __init__(self, client: Any) -> None:
        self.client, self.seconds = client, 0.0

    def __getattr__(self, name: str) -> Any:
        def call(**arguments: Any) -> Any:
            start = time.perf_counter()
            try:
                return getattr(self.client, name)(**arguments)
            finally:
                self.seconds += time.perf_counter() - start

        return call


class Memory:
    """In the place of TransferQueue's client: a read makes a copy, as one over the network does, a write keeps nothing."""

    def kv_batch_get(self, keys: list[str], partition_id: str, select_fields: list[str]) -> Any:
        return self.fields.select(*select_fields).clone()

    def kv_batch_put(self, keys: list[str], partition_id: str, fields: Any) -> SimpleNamespace:
        if not hasattr(self, "fields"):
            self.fields = fields
        return SimpleNamespace(fields=list({*self.fields.keys(), *fields.keys()}))


@contextlib.contextmanager
def transfer_queue() -> Iterator[Any]:
    """verl's TransferQueue as verl configures it, on a Ray of its own."""
    import ray
    import transfer_queue as tq
    from hydra import compose, initialize_config_module
    from omegaconf import open_dict

    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer").transfer_queue
    with open_dict(config):
        config.enable = True
    with tempfile.TemporaryDirectory(prefix="asyppo-ray-") as folder:
        ray.init(address="local", num_cpus=16, include_dashboard=False, _temp_dir=folder)
        try:
            tq.init(config)
            yield tq
            tq.close()
        finally:
            ray.shutdown()


class Workers:
    """In the place of the workers: has a size, answers at once."""

    def __init__(self, ranks: int) -> None:
        self.world_size = ranks
        self._dispatch_info = {"actor": list(range(ranks))}
        self._collect_info: dict[str, list[bool]] = {}

    def _query_collect_info(self, mesh: str) -> list[bool]:
        return [True] * self.world_size

    def infer_batch(self, batch: Any) -> SimpleNamespace:
        return SimpleNamespace(futures=[])

    def train_mini_batch(self, batch: Any) -> SimpleNamespace:
        metrics = {"vf_loss": [0.5], "vf_clipfrac": [0.0], "grad_norm": [1.0], "lr": [1e-5], "mfu": [0.4]}
        return SimpleNamespace(get=lambda: {"metrics": metrics})


def make_batch(queue: Any, exponent: int, num_critics: int) -> Any:
    """Put a batch into the queue as verl does; a tenth of its tokens are observations."""
    import torch
    from tensordict import TensorDict
    from transfer_queue import KVBatchMeta

    from asyppo_verl.critic_worker import value_field

    torch.manual_seed(0)
    tokens = 1 << exponent
    rows = tokens // WIDTH
    # fp32 values with the precision of bf16: the largest fields, with the many ties that bf16 leaves in sigma.
    fields = {value_field(index): torch.randn(tokens).bfloat16().float() for index in range(num_critics)}
    fields |= {name: torch.randn(tokens) for name in ("advantages", "returns")}
    fields["rm_scores"] = torch.zeros(tokens)
    fields["response_mask"] = (torch.rand(tokens) < 0.9).long()
    offsets = torch.arange(0, tokens + 1, WIDTH)
    nested = {name: torch.nested.nested_tensor_from_jagged(field, offsets) for name, field in fields.items()}
    # In the order of the keys, which is the order in which the hooks read them.
    keys = sorted(f"{prompt:032x}_{session}_0" for prompt in range(rows // RESPONSES) for session in range(RESPONSES))
    prompt_lengths = torch.randint(100, 1000, (rows,)).tolist()
    tags = [{"prompt_len": n, "response_len": WIDTH, "seq_len": n + WIDTH} for n in prompt_lengths]
    queue.kv_batch_put(keys=keys, partition_id="train", fields=TensorDict(nested, batch_size=rows))
    batch = KVBatchMeta(partition_id="train", keys=keys, tags=tags)
    batch.fields = list(fields)
    return batch


def make_trainer(exponent: int, ranks: int, lam: float, num_critics: int) -> Any:
    """The hooks of AsyPPO over a trainer that does nothing, with verl's configuration."""
    import verl.trainer.ppo.v1  # noqa: F401  first: the plugin's hooks on it import our trainer
    from hydra import compose, initialize_config_module

    from asyppo_verl import critic_client, trainer
    from asyppo_verl.config import AsyPPOConfig

    critic_client.ray = SimpleNamespace(get=list)  # type: ignore[assignment]  # the real one would start Ray

    class Idle:
        def _balance_batch(self, batch: Any, *_: Any, **__: Any) -> Any:
            return batch

        def _compute_advantage(self, batch: Any, metrics: dict) -> Any:
            return batch

    class Driver(trainer.AsyPPOMixin, Idle):  # type: ignore[misc]
        def __init__(self) -> None:
            self.asyppo, self.global_steps = AsyPPOConfig(num_critics=num_critics), 1
            self.critic_wg = self.actor_rollout_wg = Workers(ranks)
            self.tokenizer = SimpleNamespace(eos_token_id=0)

    driver = Driver()
    mini_batch = (1 << exponent) // WIDTH // RESPONSES // 4  # four optimizer steps: no rows of padding
    with initialize_config_module("verl.trainer.config", version_base=None):
        driver.config = compose(
            "ppo_trainer",
            [
                f"actor_rollout_ref.rollout.n={RESPONSES}",
                f"actor_rollout_ref.actor.ppo_mini_batch_size={mini_batch}",
                f"critic.ppo_mini_batch_size={mini_batch}",
                "actor_rollout_ref.actor.entropy_coeff=0.001",
                "critic.use_dynamic_bsz=True",
                f"algorithm.lam={lam}",
            ],
        )
    return driver


def resident(key: str) -> int:
    """Bytes of resident memory of this process now (``VmRSS``) or at its peak (``VmHWM``)."""
    return 1024 * int(re.findall(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[0])


def measure(queue: Queue, exponent: int, repeats: int, ranks: int, lam: float, num_critics: int) -> dict:
    """Median seconds of a step and of its stages, and the growth of memory, in GiB."""
    import torch

    from asyppo_verl import batch_io

    torch.set_num_threads(2)
    # What needs more fails here, rather than taking the machine's memory.
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
    driver = make_trainer(exponent, ranks, lam, num_critics)
    batch = make_batch(queue, exponent, num_critics)
    batch_io.tq = queue
    base = resident("VmRSS")
    rounds = []
    for _ in range(repeats):
        metrics: dict = {}
        seconds, peaks, cpu, waited = [], [], time.process_time(), 0.0
        for hook in (driver._balance_batch, driver._compute_values, driver._compute_advantage, driver._update_critic):
            Path("/proc/self/clear_refs").write_text("5")  # starts the peak anew
            queue.seconds, start = 0.0, time.perf_counter()
            batch = hook(batch, metrics)
            seconds.append(time.perf_counter() - start - queue.seconds)
            peaks.append((resident("VmHWM") - base) / 2**30)
            waited += queue.seconds
        rounds.append((sum(seconds), time.process_time() - cpu, waited, max(peaks), seconds, peaks))
    totals, cpus, waits, highest, of_stages, gib_of_stages = zip(*rounds, strict=True)
    return {
        "tokens": 1 << exponent,
        "masked": [metrics[f"asyppo/{name}_fraction"] for name in ("adv_masked", "entropy_filtered")],
        "seconds": round(statistics.median(totals), 3),
        "spread_seconds": [round(min(totals), 3), round(max(totals), 3)],
        "cpu_seconds": round(statistics.median(cpus), 3),
        "queue_seconds": round(statistics.median(waits), 3),
        "peak_gib": round(max(highest), 3),
        "stage_seconds": [round(statistics.median(column), 3) for column in zip(*of_stages, strict=True)],
        "stage_peak_gib": [round(max(column), 3) for column in zip(*gib_of_stages, strict=True)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--exponents", type=int, nargs="+", default=[20, 22, 24, 26], help="log2 of the token counts")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=8, help="data-parallel ranks of the critics")
    parser.add_argument("--critics", type=int, default=2)
    parser.add_argument("--lam", type=float, default=1.0, help="the actor's lambda; below 1 the critics have their own")
    parser.add_argument("--transfer-queue", action="store_true", help="run the fields through the real TransferQueue")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        with transfer_queue() if arguments.transfer_queue else contextlib.nullcontext(Memory()) as client:
            shape = (arguments.one, arguments.repeats, arguments.ranks, arguments.lam, arguments.critics)
            print(json.dumps(measure(Queue(client), *shape)))
        return
    print(
        f"{'tokens':>10} {'s':>7} {'min':>7} {'max':>7} {'cpu s':>7} {'queue s':>7} {'GiB':>5}   {'; '.join(STAGES)}: s (GiB)"
    )
    for exponent in arguments.exponents:
        command = [sys.executable, __file__, *sys.argv[1:], "--one", str(exponent)]
        run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        result = json.loads(run.stdout.splitlines()[-1])
        times = [result["seconds"], *result["spread_seconds"], result["cpu_seconds"], result["queue_seconds"]]
        stages = zip(result["stage_seconds"], result["stage_peak_gib"], strict=True)
        print(
            f"{result['tokens']:>10} {' '.join(f'{value:>7.3f}' for value in times)} {result['peak_gib']:>5.2f}   "
            + "; ".join(f"{seconds:.2f} ({peak:.2f})" for seconds, peak in stages),
            flush=True,
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
