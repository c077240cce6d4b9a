"""What a run keeps for the token view: the text of every token, for any tokenizer and script."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from asyppo_verl.config import AsyPPOConfig
from asyppo_verl.inspection import BROKEN, decoder, token_texts
from recipe.asyppo.toy.make_toy import build_tokenizer

TEXTS = [
    "So 12*3 = 36, thus \\boxed{36}.\n\n  Wait\t…",
    "שלום עולם, الجواب هو ٣٦ ويساوي 36",
    "答案是三十六。数学は楽しい 정답은 36",
    "नमस्ते दुनिया กขค ê̂ 👩‍🚀👩🏽‍🔬🇨🇭 𐍈∑",
]


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama's: words begin with a metaspace, unknown characters become bytes, decoding drops the first space."""
    pieces = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdefghijklmnopqrstuvwxyz0123456789.,=*\\{}",
    ]
    tokenizer = Tokenizer(
        models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("tokenizer", [build_tokenizer(), byte_fallback()], ids=["bytes", "byte_fallback"])
@pytest.mark.parametrize("text", TEXTS)
def test_every_character_stands_at_its_first_token(tokenizer, text):
    before = tokenizer.encode("a", add_special_tokens=False)
    ids = tokenizer.encode(f"a{text}", add_special_tokens=False)[len(before) :]
    # A token a byte: the first byte of a character stands for all of it.
    expected = [part for character in text for part in (character, *[""] * (len(character.encode()) - 1))]
    assert token_texts(ids, decoder(tokenizer)) == expected


def test_bytes_that_are_no_text_and_special_tokens_are_shown():
    tokenizer = build_tokenizer()
    broken = tokenizer.encode("é", add_special_tokens=False)[0]
    letter = tokenizer.encode("x", add_special_tokens=False)[0]
    end = tokenizer.eos_token_id
    texts = token_texts([broken, letter, broken, broken, broken, broken, broken, end], decoder(tokenizer))
    assert texts == [BROKEN, "x", *[BROKEN] * 5, "<|endoftext|>"]


def test_ten_thousand_random_tokens_have_a_text_each():
    tokenizer, rng = build_tokenizer(), random.Random(0)
    ids = [rng.randrange(len(tokenizer)) for _ in range(10_000)]
    texts = token_texts(ids, decoder(tokenizer))
    assert len(texts) == 10_000
    assert "".join(texts).replace(BROKEN, "") == decoder(tokenizer)(tuple(ids)).replace(BROKEN, "")
    assert token_texts([], decoder(tokenizer)) == []


def test_it_is_off_by_default_and_due_every_so_many_steps():
    assert not any(AsyPPOConfig().inspect.is_due(step) for step in range(200))
    inspect = AsyPPOConfig.from_node({"inspect": {"every": 3}}).inspect
    assert [step for step in range(1, 10) if inspect.is_due(step)] == [3, 6, 9] and inspect.groups == 2
    for node, said in [
        ({"every": 2.5}, r"asyppo.inspect.every=2.5 must be a whole number"),
        ({"group": 2}, r"asyppo.inspect.group=2 is not a setting; did you mean groups"),
        (5, r"asyppo.inspect=5 must be a mapping such as \{every: 50, groups: 2\}"),
    ]:
        with pytest.raises(ValueError, match=said):
            AsyPPOConfig.from_node({"inspect": node})
