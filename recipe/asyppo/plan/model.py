"""Decoder-only transformers by their shape: exact parameter counts and floating-point work, from the configuration alone."""

import dataclasses
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder with RMSNorm, grouped-query attention and a gated MLP, with a language-model head or a value head."""

    name: str
    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool
    """Whether input embedding and language-model head are one matrix."""
    qk_norm: bool = True
    """Whether queries and keys are normalised per head (Qwen3)."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    value_head: bool = False
    """A scalar per token, with a bias, in place of the language-model head."""

    @property
    def shape(self) -> dict[str, int]:
        """Vocabulary, widths and counts, under their names in a Hugging Face configuration."""
        widths = {"hidden_size": self.hidden, "intermediate_size": self.intermediate, "head_dim": self.head_dim}
        heads = {"num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads}
        return {"vocab_size": self.vocab, "num_hidden_layers": self.layers, **widths, **heads}

    def as_critic(self) -> "Model":
        return dataclasses.replace(self, value_head=True)

    @property
    def query(self) -> int:
        """Width of all query heads."""
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        """Width of all key heads, and of all value heads."""
        return self.kv_heads * self.head_dim

    @property
    def layer_matrices(self) -> int:
        """Parameters of one layer that every token is multiplied with."""
        return 2 * self.hidden * (self.query + self.key) + 3 * self.hidden * self.intermediate

    @property
    def layer_tensors(self) -> list[tuple[int, int, int]]:
        """Parameters of one layer as (number of them, rows, width); FSDP shards the rows."""
        return [
            (1, self.query, self.hidden),
            (2, self.key, self.hidden),
            (1, self.hidden, self.query),
            (2, self.intermediate, self.hidden),
            (1, self.hidden, self.intermediate),
            (2, self.hidden, 1),
            (2 * self.qk_norm, self.head_dim, 1),
            (self.qkv_bias, self.query, 1),
            (2 * self.qkv_bias, self.key, 1),
            (self.o_bias + self.mlp_bias, self.hidden, 1),
            (2 * self.mlp_bias, self.intermediate, 1),
        ]

    @property
    def tensors(self) -> list[tuple[int, int, int]]:
        """All parameters in the same form, a tied embedding once."""
        layers = [(self.layers * count, rows, width) for count, rows, width in self.layer_tensors]
        head = [(1, 1, self.hidden), (1, 1, 1)] if self.value_head else [(int(not self.tied), self.vocab, self.hidden)]
        return [*layers, (1, self.vocab, self.hidden), (1, self.hidden, 1), *head]

    @property
    def layer(self) -> int:
        """Parameters of one layer."""
        return sum(count * rows * width for count, rows, width in self.layer_tensors)

    @property
    def embedding(self) -> int:
        return self.vocab * self.hidden

    @property
    def params(self) -> int:
        """All parameters, a tied embedding counted once."""
        return sum(count * rows * width for count, rows, width in self.tensors)

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values that one token leaves in a bf16 cache."""
        return 2 * 2 * self.layers * self.key

    def forward_flops(self, tokens: float, squares: float) -> float:
        """Work of a forward pass: 2 per matrix element and token; attention looks back only, 2 x 2 x width x s^2 / 2.

        Args:
            tokens: number of tokens.
            squares: sum over sequences of the squared length.
        """
        return self._head_flops(tokens) + self._body_flops(tokens) + self._attention_flops(squares)

    def training_flops(self, tokens: float, squares: float, recompute: bool = True) -> float:
        """Work of forward and backward, with gradient checkpointing (``recompute``) or without.

        A matrix's backward is twice its forward; that of flash attention is 2.5 times, since it recomputes the scores.
        Checkpointing runs a layer's forward a second time, up to the layer's last matrix, whose output nothing needs.
        """
        spared = 2 * tokens * self.layers * self.hidden * self.intermediate
        body = (4 * self._body_flops(tokens) - spared) if recompute else 3 * self._body_flops(tokens)
        return 3 * self._head_flops(tokens) + body + (3.5 + recompute) * self._attention_flops(squares)

    def _head_flops(self, tokens: float) -> float:
        return 2 * tokens * self.hidden * (1 if self.value_head else self.vocab)

    def _body_flops(self, tokens: float) -> float:
        return 2 * tokens * self.layers * self.layer_matrices

    def _attention_flops(self, squares: float) -> float:
        return 2 * squares * self.layers * self.query


def _qwen3(size: str, hidden: int, intermediate: int, layers: int, heads: int, tied: bool) -> Model:
    return Model(f"Qwen3-{size}", 151_936, hidden, intermediate, layers, heads, 8, 128, tied)


BUILT_IN = {
    model.name.lower().removeprefix("qwen3-"): model
    for model in (
        _qwen3("0.6B", 1024, 3072, 28, 16, tied=True),
        _qwen3("1.7B", 2048, 6144, 28, 16, tied=True),
        _qwen3("4B", 2560, 9728, 36, 32, tied=True),
        _qwen3("8B", 4096, 12288, 36, 32, tied=False),
        _qwen3("14B", 5120, 17408, 40, 40, tied=False),
        _qwen3("32B", 5120, 25600, 64, 64, tied=False),
    )
}
"""Published shapes of the dense Qwen3 models, so that planning with them needs no download; Base has the same."""

FAMILIES = {
    # model_type: what its attention and MLP have, beyond matrices and layer norms
    "qwen3": lambda config: {"qkv_bias": config.attention_bias, "o_bias": config.attention_bias},
    "qwen2": lambda config: {"qk_norm": False, "qkv_bias": True},
    "llama": lambda config: {
        "qk_norm": False,
        "qkv_bias": config.attention_bias,
        "o_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    },
}


def read_model(name: str) -> Model:
    """A built-in Qwen3 name (``4b``, ``qwen3-4b``, ``Qwen/Qwen3-4B-Base``), or a folder or hub name in Hugging Face format.

    Raises:
        ValueError: if there is no such model, or it is of a family that is not known here.
    """
    short = name.lower().removeprefix("qwen/").removeprefix("qwen3-").removesuffix("-base")
    if short in BUILT_IN and not Path(name).exists():
        return BUILT_IN[short]
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"the model {name!r} cannot be read ({reason}); give a folder with config.json, a name on the Hugging Face hub, "
            f"or one of {', '.join(BUILT_IN)} (Qwen3)"
        ) from error
    return from_config(config, Path(name).name)


def from_config(config: Any, name: str) -> Model:
    """The model that a transformers configuration describes.

    Raises:
        ValueError: if its family is not known here.
    """
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"the model {name!r} has model_type={config.model_type}, which cannot be counted; use one of {', '.join(FAMILIES)}"
        )
    return Model(
        name=name,
        vocab=config.vocab_size,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        tied=config.tie_word_embeddings,
        **FAMILIES[config.model_type](config),
    )
