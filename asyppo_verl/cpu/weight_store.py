"""Weights from a trainer to rollout processes of their own, without an accelerator (verl's ``checkpoint_engine``).

verl's own engines need one (nccl, hccl, nixl, mooncake, kimi), or the rollout in the trainer's process (naive). Used as
``rollout.checkpoint_engine.backend=tcp_store`` with ``custom_backend_module=asyppo_verl.cpu.weight_store``.
"""

import io
import itertools
from collections.abc import AsyncIterator
from typing import Any

import ray
import torch
from torch import Tensor
from torch.distributed import TCPStore
from verl.checkpoint_engine.base import (
    CheckpointEngine,
    CheckpointEngineRegistry,
    TensorMeta,
    merge_weight_chunks,
    split_weight_chunks,
)

CHUNK_BYTES = 1 << 22
"""torch's store takes values below 8 MiB."""


@CheckpointEngineRegistry.register("tcp_store")
class StoreCheckpointEngine(CheckpointEngine):
    """The trainer's first rank puts all weights into a torch ``TCPStore``, from which every rollout process reads them.

    The store holds a full copy of the weights during a transfer: meant for small models. Each transfer has its own store.
    """

    def __init__(self, bucket_size: int, is_master: bool = False) -> None:
        self.is_master = is_master
        self.store: TCPStore | None = None

    def prepare(self) -> tuple[str, int] | None:
        """Open a store on the trainer's first rank; returns its address, None on the others."""
        if not self.is_master:
            return None
        host = ray.util.get_node_ip_address().strip("[]")
        self.store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        return host, self.store.port

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[Any]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Only the rollout ranks connect to the store."""
        return {"address": [None] * actor_wg_world_size}, {"address": [metadata[0]] * rollout_world_size}

    def init_process_group(self, address: tuple[str, int] | None) -> None:
        """Connect to the store at ``address``."""
        if address is not None:
            self.store = TCPStore(*address, is_master=False)

    def finalize(self) -> None:
        """Close the store, which frees the copy of the weights."""
        self.store = None

    @torch.no_grad()
    async def send_weights(self, weights: Any, global_steps: int | None = None) -> None:
        """Store the weights chunk by chunk; every rank walks through them, since they are gathered on the way."""
        index = 0
        async for meta, chunk in split_weight_chunks(weights, CHUNK_BYTES):
            # A copy, since torch.save writes all of the storage that a slice is of.
            self._put(index, {"meta": vars(meta), "data": chunk.cpu().clone()})
            index += 1
        self._put(index, {})

    def _put(self, index: int, item: dict[str, Any]) -> None:
        if self.store is not None:
            file = io.BytesIO()
            torch.save(item, file)
            self.store.set(str(index), file.getvalue())  # type: ignore[arg-type]  # torch's stub knows text only

    async def receive_weights(self, global_steps: int | None = None) -> AsyncIterator[tuple[str, Tensor]]:
        """Yield every weight with its name, in the order in which they were sent."""
        async for weight in merge_weight_chunks(self._chunks(), CHUNK_BYTES):
            yield weight

    async def _chunks(self) -> AsyncIterator[tuple[TensorMeta, Tensor]]:
        assert self.store is not None, "init_process_group comes first"
        for index in itertools.count():
            # Waits until the chunk is there. Tensors and plain values only: whatever else a store may hold is not run.
            item = torch.load(io.BytesIO(self.store.get(str(index))), weights_only=True)
            if not item:
                return
            yield TensorMeta(**item["meta"]), item["data"]
