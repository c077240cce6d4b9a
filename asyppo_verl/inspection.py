"""Keep a few groups of a step, token by token, for the report's token view: a Parquet file a step, a row a response."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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
    keep_adv, keep_ent = _rows(responses, keep_adv_N, keys), _rows(responses, keep_ent_N, keys)
    advantages = _rows(responses, responses["advantages"], keys)
    columns = {"step": [step] * len(keys)} | _texts(batch, keys, decoder(tokenizer))
    columns |= {f"value_{index}": _rows(responses, values_N, keys) for index, values_N in enumerate(values_MN)}
    columns |= {
        "is_response": [row.bool() for row in _rows(responses, responses["response_mask"], keys)],
        "sigma": _rows(responses, sigma_N, keys),
        "advantage": advantages,
        "advantage_after_mask": list(map(asyppo.mask_advantage, advantages, keep_adv)),
        "masked": [~row for row in keep_adv],
        "filtered": [~row for row in keep_ent],
    }
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"step_{step:06d}.unfinished"
    table = pa.table({name: [_plain(cell) for cell in column] for name, column in columns.items()})
    pq.write_table(table, unfinished, compression="zstd")
    unfinished.replace(folder / f"step_{step:06d}.parquet")


def _texts(batch: KVBatchMeta, keys: Sequence[str], decode: Callable[[tuple[int, ...]], str]) -> dict[str, list]:
    """The columns that stand in TransferQueue."""
    fields = ["responses", "rm_scores", *(field for field in ("entropy",) if field in batch.fields)]
    texts = batch_io.fetch(batch_io.select(batch, list(keys), fields), *fields)
    prompts = batch_io.fetch(batch_io.select(batch, list(keys), ["prompts"]), "prompts")
    ids, rewards, *entropy = (_rows(texts, texts[field], keys) for field in fields)
    sessions = [batch_io.session_of(key) for key in keys]
    return {
        "group": [group for group, _ in sessions],
        "response": [key.removeprefix(f"{group}_") for key, (group, _) in zip(keys, sessions, strict=True)],
        "prompt": ["".join(token_texts(row.tolist(), decode)) for row in _rows(prompts, prompts["prompts"], keys)],
        "score": [float(row.sum()) for row in rewards],
        "token_id": ids,
        "token": [token_texts(row.tolist(), decode) for row in ids],
        "reward": rewards,
        **({"entropy": entropy[0]} if entropy else {}),
    }


def _plain(cell: Any) -> Any:
    """A vector as numpy has it, which knows no bfloat16."""
    if not isinstance(cell, Tensor):
        return cell
    return (cell.float() if cell.is_floating_point() else cell).numpy()


def _rows(responses: batch_io.Responses, vector_N: Tensor, keys: Sequence[str]) -> list[Tensor]:
    """The rows of a vector that have these keys."""
    where = {key: index for index, key in enumerate(responses.keys)}
    starts = responses.offsets.tolist()
    return [vector_N[starts[where[key]] : starts[where[key] + 1]] for key in keys]


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


def token_texts(tokens: Sequence[int], decode: Callable[[tuple[int, ...]], str]) -> list[str]:
    """The text of every token; a character made of several tokens stands at its first one, the others have none.

    A character has at most four bytes, hence at most four tokens; bytes that never become one are shown as U+FFFD.
    """
    ids = tuple(tokens)
    texts: list[str] = []
    while len(texts) < len(ids):
        start = len(texts)
        parts = (ids[start:end] for end in range(start + 1, min(start + 4, len(ids)) + 1))
        part = next((part for part in parts if BROKEN not in decode(part)), ids[start : start + 1])
        texts += [decode(part), *[""] * (len(part) - 1)]
    return texts
