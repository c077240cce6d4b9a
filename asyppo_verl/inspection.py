"""Keep a few groups of a step, token by token, for the report's token view: a Parquet file a step, a row a response."""

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transfer_queue import KVBatchMeta

from asyppo_verl import asyppo, batch_io


def write(
    folder: Path,
    step: int,
    batch: KVBatchMeta,
    tokenizer: Any,
    *,
    groups: int,
    responses: batch_io.Responses,
    values_MN: Tensor,
    sigma_N: Tensor,
    keep_adv_N: Tensor,
    keep_ent_N: Tensor,
) -> None:
    """Write ``step_<step>.parquet`` with every response of the first ``groups`` groups in the order of their ids.

    Group ids are random, so these are groups like any others. ``step``, ``group``, ``response``, ``prompt`` and ``score``
    (the sum of ``reward``) are one thing a response, the other columns lists over its tokens. ``entropy`` is missing where verl
    has not computed it (``algorithm.rollout_correction.bypass_mode``).

    Args:
        batch: rows with ``prompts``, ``responses``, ``rm_scores`` and perhaps ``entropy`` in TransferQueue.
        responses: ``response_mask`` and ``advantages``, before the mask, with the keys and offsets of all vectors.
        values_MN, sigma_N: what the mini-critics said.
        keep_adv_N, keep_ent_N: the two selections, True = used.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    keys = sorted(batch_io.response_keys(batch))
    first = sorted({batch_io.session_of(key)[0] for key in keys})[:groups]
    keys = [key for key in keys if batch_io.session_of(key)[0] in first]
    fields = ["responses", "rm_scores", *(field for field in ("entropy",) if field in batch.fields)]
    texts = batch_io.fetch(batch_io.select(batch, keys, fields), *fields)
    prompts = batch_io.fetch(batch_io.select(batch, keys, ["prompts"]), "prompts")
    decode = decoder(tokenizer)
    rewards, ids = _rows(texts, texts["rm_scores"], keys), _rows(texts, texts["responses"], keys)
    vectors = {
        "is_response": responses["response_mask"].bool(),
        **{f"value_{index}": values_N for index, values_N in enumerate(values_MN)},
        "sigma": sigma_N,
        "advantage": responses["advantages"],
        "advantage_after_mask": asyppo.mask_advantage(responses["advantages"], keep_adv_N),
        "masked": ~keep_adv_N,
        "filtered": ~keep_ent_N,
    }
    columns = {
        "step": [step] * len(keys),
        "group": [batch_io.session_of(key)[0] for key in keys],
        "response": [key.removeprefix(batch_io.session_of(key)[0] + "_") for key in keys],
        "prompt": ["".join(token_texts(row, decode)) for row in _rows(prompts, prompts["prompts"], keys)],
        "score": [float(row.sum()) for row in rewards],
        "token_id": ids,
        "token": [token_texts(row, decode) for row in ids],
        "reward": rewards,
        **{name: _rows(responses, vector_N, keys) for name, vector_N in vectors.items()},
        **{field: _rows(texts, texts[field], keys) for field in fields[2:]},
    }
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"step_{step:06d}.unfinished"
    pq.write_table(pa.table(columns), unfinished, compression="zstd")
    unfinished.replace(folder / f"step_{step:06d}.parquet")


def _rows(responses: batch_io.Responses, vector_N: Tensor, keys: Sequence[str]) -> list[np.ndarray]:
    """The rows with these keys of a vector; numbers as float32 (or whole), whatever their precision was."""
    where = {key: index for index, key in enumerate(responses.keys)}
    starts = responses.offsets.tolist()
    rows = [vector_N[starts[where[key]] : starts[where[key] + 1]] for key in keys]
    return [(row.to(torch.float32) if row.is_floating_point() else row).numpy() for row in rows]


# -- text --------------------------------------------------------------------------------------------------------------

BROKEN = "\ufffd"
"""Stands for bytes that are no complete character."""


def decoder(tokenizer: Any) -> Callable[[tuple[int, ...]], str]:
    """Text of a few token ids as it is in the middle of a text: decoders drop or add a space at the beginning of one."""
    before = tokenizer.encode("a", add_special_tokens=False)
    decode = functools.partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    prefix = decode(before)

    @functools.cache
    def text(ids: tuple[int, ...]) -> str:
        return decode([*before, *ids]).removeprefix(prefix)

    return text


def token_texts(tokens: Iterable[int], decode: Callable[[tuple[int, ...]], str]) -> list[str]:
    """The text of every token; a character made of several tokens stands at its first one, the others have none.

    A character has at most four bytes, hence at most four tokens; bytes that never become one are shown as U+FFFD.
    """
    ids = tuple(map(int, tokens))
    texts: list[str] = []
    while len(texts) < len(ids):
        start = len(texts)
        parts = (ids[start:end] for end in range(start + 1, min(start + 4, len(ids)) + 1))
        part = next((part for part in parts if BROKEN not in decode(part)), ids[start : start + 1])
        texts += [decode(part), *[""] * (len(part) - 1)]
    return texts
