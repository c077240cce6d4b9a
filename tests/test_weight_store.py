"""The weight transfer between processes on a CPU: every bit arrives, in order, at every rollout rank, step after step."""

import asyncio
import multiprocessing
from typing import Any

import pytest
import torch
from verl.checkpoint_engine.base import CheckpointEngineRegistry

from asyppo_verl.cpu.weight_store import CHUNK_BYTES, StoreCheckpointEngine


def weights(step: int) -> list[tuple[str, torch.Tensor]]:
    """Several dtypes, a scalar, and one weight of two chunks and a bit."""
    generator = torch.Generator().manual_seed(step)
    large = CHUNK_BYTES // 2 + 7
    return [
        ("a.weight", torch.randn(3, 5, generator=generator)),
        ("b.weight", torch.randn(large, generator=generator).bfloat16()),
        ("c.steps", torch.tensor(step)),
        ("d.weight", torch.randn(2, large // 2, generator=generator)),
        ("e.weight", torch.randn(4, generator=generator).half()),
    ]


async def _receive(engine: StoreCheckpointEngine) -> list[tuple[str, torch.Tensor]]:
    return [(name, weight.clone()) async for name, weight in engine.receive_weights()]


def _rollout(inbox: Any, verdicts: Any, steps: int) -> None:
    """A rollout process: connect, receive, compare, for every step."""
    engine = StoreCheckpointEngine(bucket_size=1 << 20)
    assert engine.prepare() is None
    for step in range(steps):
        engine.init_process_group(inbox.get())
        found, expected = asyncio.run(_receive(engine)), weights(step)
        verdicts.put(
            [name for name, _ in found] == [name for name, _ in expected]
            and all(a.dtype == b.dtype and torch.equal(a, b) for (_, a), (_, b) in zip(found, expected, strict=True))
        )
        engine.finalize()


@pytest.mark.timeout(120)
def test_every_rollout_process_gets_every_bit_of_every_step():
    assert CheckpointEngineRegistry.get("tcp_store") is StoreCheckpointEngine
    spawn = multiprocessing.get_context("spawn")
    steps, ranks = 2, 2
    verdicts, inboxes = spawn.Queue(), [spawn.Queue() for _ in range(ranks)]
    processes = [spawn.Process(target=_rollout, args=(inbox, verdicts, steps)) for inbox in inboxes]
    for process in processes:
        process.start()
    master, other = StoreCheckpointEngine(1 << 20, is_master=True), StoreCheckpointEngine(1 << 20)
    for step in range(steps):
        metadata = [master.prepare(), other.prepare()]
        trainers, rollouts = StoreCheckpointEngine.build_topology(2, ranks, metadata)
        for engine, address in zip((master, other), trainers["address"], strict=True):
            engine.init_process_group(address)
        for inbox, address in zip(inboxes, rollouts["address"], strict=True):
            inbox.put(address)
        # The second trainer rank walks through the weights too, since gathering them needs all ranks.
        walked = iter(weights(step))
        asyncio.run(other.send_weights(walked))
        assert next(walked, None) is None
        asyncio.run(master.send_weights(iter(weights(step))))
        assert [verdicts.get(timeout=60) for _ in range(ranks)] == [True] * ranks
        master.finalize()
    for process in processes:
        process.join(timeout=30)
        assert process.exitcode == 0
