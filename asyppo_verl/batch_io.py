"""Every read and write of TransferQueue, verl's store of the batch; rows are paired by key, never by position."""

import dataclasses
import uuid

import torch
import transfer_queue as tq
from tensordict import TensorDict
from torch import Tensor
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.padding_utils import construct_minimal_padding_template
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

EVALUATION_FIELDS = ["input_ids", "position_ids", "loss_mask"]
"""Fields with which a value model evaluates a row; the loss mask has the length of the response."""

TRAINING_FIELDS = [*EVALUATION_FIELDS, "prompts", "responses", "response_mask", "returns"]
"""Fields of verl's value loss besides the values before the update."""

KEEP_ENTROPY = "asyppo_keep_entropy"
"""Field with the tokens whose entropy earns the bonus, True = used."""


@dataclasses.dataclass(frozen=True)
class Responses:
    """Response positions of a batch, the rows in the order of their keys and joined to vectors of N positions."""

    keys: list[str]
    offsets: Tensor
    """Row i is ``[offsets[i], offsets[i + 1])`` of every vector; shape (B + 1,)."""
    fields: dict[str, Tensor]

    def __getitem__(self, field: str) -> Tensor:
        return self.fields[field]

    def padded(self, field_N: Tensor) -> Tensor:
        """Turn a vector into a (B, T) tensor, zero behind the end of each row."""
        # Without this bound torch makes every row as long as all rows together.
        longest = int(self.offsets.diff().max())
        nested_BT = torch.nested.nested_tensor_from_jagged(field_N, self.offsets, max_seqlen=longest)
        return nested_BT.to_padded_tensor(0)

    def joined(self, field_BT: Tensor) -> Tensor:
        """Invert :meth:`padded`."""
        is_inside_BT = torch.arange(field_BT.shape[1]) < self.offsets.diff()[:, None]
        return field_BT[is_inside_BT]


def session_of(key: str) -> tuple[str, str]:
    """Split off (group id, session id) of a row key ``{group}_{session}_{output}``."""
    group, session, _output = key.rsplit("_", 2)
    return group, session


def response_keys(batch: KVBatchMeta) -> list[str]:
    """List the keys of the rows that are not padding, in batch order."""
    return [key for key, tag in zip(batch.keys, batch.tags, strict=True) if not tag.get("is_padding", False)]


def add_fillers(batch: KVBatchMeta, count: int, eos_token_id: int, fields: list[str]) -> KVBatchMeta:
    """Store ``count`` rows without response tokens for critics' training calls, made by verl; they never join the batch.

    Args:
        batch: whose partition they go to; the first row says how its position ids are laid out.
        count: how many.
        eos_token_id: what they consist of.
        fields: set to zero on their one response position.
    """
    if not count:
        return KVBatchMeta(partition_id=batch.partition_id)
    source = tq.kv_batch_get(keys=batch.keys[:1], partition_id=batch.partition_id, select_fields=["position_ids"])[0]
    row, tag = construct_minimal_padding_template(dict(source.items()), batch.tags[0], eos_token_id)
    row |= {field: torch.zeros(1) for field in fields}
    group = f"filler{uuid.uuid4().hex}"
    keys, tags = [f"{group}_{index}_0" for index in range(count)], [tag] * count
    data = list_of_dict_to_tensordict([{"uid": group, **row}] * count)
    tq.kv_batch_put(keys=keys, partition_id=batch.partition_id, fields=data, tags=tags)
    return KVBatchMeta(partition_id=batch.partition_id, keys=keys, tags=tags)


def remove(rows: KVBatchMeta) -> None:
    """Delete rows with all their fields."""
    if rows.keys:
        tq.kv_clear(keys=rows.keys, partition_id=rows.partition_id)


def fetch(batch: KVBatchMeta, *fields: str) -> Responses:
    """Read fields that are stored on response positions."""
    keys = sorted(batch.keys)
    data = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=list(fields))
    return Responses(keys, data[fields[0]].offsets(), {field: data[field].values() for field in fields})


def read(batch: KVBatchMeta, fields: list[str]) -> dict[str, Tensor]:
    """Fetch further fields on response positions as vectors, rows in the order of their keys.

    Raises:
        ValueError: if the batch has no such field, naming those that it has.
    """
    for field in fields:
        if field not in batch.fields:
            raise ValueError(f"the batch has no field {field}; it has {', '.join(sorted(batch.fields))}")
    return fetch(batch, *fields).fields


def store(batch: KVBatchMeta, responses: Responses, **fields_N: Tensor) -> list[str]:
    """Write vectors on response positions; returns the names of all fields that the rows now have."""
    nested = {
        field: torch.nested.nested_tensor_from_jagged(field_N, responses.offsets) for field, field_N in fields_N.items()
    }
    data = TensorDict(nested, batch_size=len(responses.keys))
    return tq.kv_batch_put(keys=responses.keys, partition_id=batch.partition_id, fields=data).fields


def select(batch: KVBatchMeta, keys: list[str], fields: list[str], **extra_info: object) -> KVBatchMeta:
    """Take some rows and fields of the batch, with batch-level settings for the worker that receives them."""
    # Without the rows' tags, which no worker reads and verl would copy one by one.
    return KVBatchMeta(
        keys=list(keys), tags=[{}] * len(keys), partition_id=batch.partition_id, fields=fields, extra_info=extra_info
    )
