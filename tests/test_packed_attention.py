"""Attention on packed rows is that of each sequence by itself."""

import math

import pytest
import torch
import transformers.modeling_flash_attention_utils
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForTokenClassification, Qwen3Config, modeling_utils

from asyppo_verl import packed_attention

POSITIONS_BT = torch.tensor([[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 0, 1]])  # sequences of 3, 1, 2, 4 and 2 tokens


def test_bounds_by_hand():
    bounds = packed_attention.bounds_of(POSITIONS_BT)
    assert bounds["cu_seq_lens_q"].tolist() == bounds["cu_seq_lens_k"].tolist() == [0, 3, 4, 6, 10, 12]
    assert bounds["cu_seq_lens_q"].dtype == torch.int32
    assert bounds["max_length_q"] == bounds["max_length_k"] == 4


@pytest.mark.parametrize("slice_T", [[3, 4, 0, 1], [3, 4]])
def test_a_slice_of_the_sequences_is_refused(slice_T):
    with pytest.raises(ValueError, match=r"begin at 3.*torch_packed.*ulysses_sequence_parallel_size=1"):
        packed_attention.bounds_of(torch.tensor([slice_T]))


def by_definition(query_BHTD, key_BHTD, value_BHTD, scaling):
    """softmax(q k / sqrt(d)) v, token by token, over the tokens of its sequence up to itself."""
    output = torch.zeros_like(query_BHTD)
    batches, heads, tokens, _ = query_BHTD.shape
    for b in range(batches):
        for h in range(heads):
            group = h * key_BHTD.shape[1] // heads
            for t in range(tokens):
                begin = t - int(POSITIONS_BT[b, t])
                scores = key_BHTD[b, group, begin : t + 1] @ query_BHTD[b, h, t] * scaling
                output[b, h, t] = scores.softmax(0) @ value_BHTD[b, group, begin : t + 1]
    return output


@pytest.mark.parametrize("given", [True, False])
def test_it_is_attention_inside_each_sequence(given):
    """Two rows of packed sequences, four heads with two key heads."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 6, 8, requires_grad=True) for heads in (4, 2, 2))
    bounds = packed_attention.bounds_of(POSITIONS_BT) if given else {}
    found, weights = packed_attention.packed_attention(
        None, query, key, value, None, scaling=1 / math.sqrt(8), dropout=0.0, position_ids=POSITIONS_BT, **bounds
    )
    expected = by_definition(query, key, value, 1 / math.sqrt(8)).transpose(1, 2)
    assert weights is None
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(expected)
    gradients = (torch.autograd.grad(output, (query, key, value), upstream) for output in (found, expected))
    for gradient, right in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, right)


def test_on_a_gpu_it_is_one_call_of_torchs_kernel():
    """Shapes and arguments, without a GPU."""
    calls = []

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if "flash" in str(op):
                calls.append((args, kwargs))
            return op(*args, **(kwargs or {}))

    with FakeTensorMode(), Noted():
        query, key = (torch.empty(2, heads, 6, 128, device="cuda", dtype=torch.bfloat16) for heads in (4, 2))
        bounds = torch.empty(6, device="cuda", dtype=torch.int32)
        output, _ = packed_attention.packed_attention(
            None, query, key, key, None, scaling=0.1, position_ids=None, cu_seq_lens_q=bounds, max_length_q=4
        )
    assert output.shape == (2, 6, 4, 128) and output.dtype == torch.bfloat16
    (((*_, q_bounds, k_bounds, longest_q, longest_k, dropout, is_causal, _), more),) = calls
    assert q_bounds is bounds and k_bounds is bounds and (longest_q, longest_k) == (4, 4)
    assert (dropout, is_causal) == (0.0, True) and more == {"scale": 0.1}


@pytest.mark.parametrize(
    ("name", "value"), [("sliding_window", 4), ("s_aux", torch.zeros(2)), ("s_aux", torch.zeros(1))]
)
def test_what_it_does_not_have_is_refused(name, value):
    heads, asked = torch.randn(2, 2, 6, 8), {"dropout": 0.0, "s_aux": None, name: value}
    with pytest.raises(ValueError, match=rf"torch_packed has no {name},.*attn_implementation=sdpa"):
        packed_attention.packed_attention(
            None, heads, heads, heads, None, scaling=1.0, position_ids=POSITIONS_BT, **asked
        )


def small_model():
    packed_attention.register(modeling_utils)
    config = Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_labels=1, classifier_dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForTokenClassification.from_config(config, attn_implementation=packed_attention.NAME)


def test_bounds_are_looked_for_once_a_call(monkeypatch):
    looked, look = [], packed_attention.bounds_of
    monkeypatch.setattr(packed_attention, "bounds_of", lambda positions: looked.append(1) or look(positions))
    model = small_model()
    ids = torch.randint(0, 64, POSITIONS_BT.shape)
    expected = model(input_ids=ids, position_ids=POSITIONS_BT).logits
    assert len(looked) == 3
    looked.clear()
    assert packed_attention.wants_bounds(model)
    packed_attention.find_bounds_once(model)
    assert torch.equal(model(input_ids=ids, position_ids=POSITIONS_BT).logits, expected) and len(looked) == 1


@pytest.mark.parametrize("given", [True, False])
def test_transformers_flash_attention_takes_the_bounds(monkeypatch, given):
    """Its own function, with torch's attention in place of flash-attn's kernel: one layer's look or none, the same values."""
    calls = []

    def kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale):
        calls.append((cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), int(max_seqlen_q), int(max_seqlen_k), causal))
        heads = (states.transpose(0, 1)[None] for states in (q, k, v))
        return packed_attention.one_by_one(*heads, cu_seqlens_q, softmax_scale)[0]

    def arguments(max_seqlen_q, max_seqlen_k, softmax_scale, is_causal, **_):
        lengths = {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}
        return {**lengths, "causal": is_causal, "softmax_scale": softmax_scale}

    model = small_model()
    packed = {"input_ids": torch.randint(0, 64, (1, 12)), "position_ids": POSITIONS_BT.flatten()[None]}
    expected = model(**packed).logits
    model.config._attn_implementation = "flash_attention_2"
    flash = transformers.modeling_flash_attention_utils
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda _: ((None, kernel, None, None, None), arguments))
    looked, look = [], flash._prepare_from_posids
    monkeypatch.setattr(flash, "_prepare_from_posids", lambda *states: looked.append(1) or look(*states))
    if given:
        packed_attention.find_bounds_once(model)
    torch.testing.assert_close(model(**packed).logits, expected)
    assert calls == [([0, 3, 4, 6, 10, 12], [0, 3, 4, 6, 10, 12], 4, 4, True)] * 3
    assert len(looked) == (0 if given else 3)


def test_only_models_that_pass_them_on_are_given_bounds():
    model = small_model()
    for attention, wanted in (("flash_attention_2", True), ("sdpa", False), ("eager", False)):
        model.config._attn_implementation = attention
        assert packed_attention.wants_bounds(model) == wanted
    foreign = torch.nn.Linear(1, 1)
    foreign.config = model.config
    model.config._attn_implementation = "flash_attention_2"
    assert not packed_attention.wants_bounds(foreign)
