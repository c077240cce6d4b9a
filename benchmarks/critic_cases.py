"""The cases of ``critic_cost.py``: which critics, with which options, on which rows, and the least that they can take."""

import argparse
import dataclasses
import re

from asyppo_verl import packed_attention
from recipe.asyppo.plan.model import BUILT_IN, Model

PROMPT = 256  # tokens of a row before its response
SHAPES = {**BUILT_IN, "tiny": Model("tiny", 512, 64, 128, 2, 4, 2, 16, tied=True)}
OPTIONS = {
    "nockpt": "no gradient checkpointing (critic.model.enable_gradient_checkpointing=False)",
    "keep": "bf16 weights are kept between forward and backward (critic.fsdp.reshard_after_forward=False)",
    "copy": "as keep, and from one micro-batch to the next: one bf16 copy a step",
    "liger": "Liger's RMSNorm, rotary embedding and SwiGLU (critic.model.use_liger=True); needs liger-kernel",
    "compile": "torch.compile of the layer that is repeated, for any number of tokens (asyppo.compile_critics=True)",
    "stack": "all critics in one pass, as one model whose matrix products are batched",
    "head": "the value head sees response tokens only",
    "foreach": "AdamW without fused=True (verl's default)",
    "profile": "where the time goes, by kernel, in one more run",
    "bounds": "the bounds of packed sequences are found once a micro-batch, not once a layer",
}
ATTENTION = {
    "flash": "flash_attention_2",
    "sdpa": "sdpa",  # transformers makes a dense mask of the positions
    "flex": "flex_attention",  # transformers makes a sparse mask of them
    "varlen": packed_attention.NAME,
    "each": "each",
    "cudnn": "cudnn",
}
"""Attention implementations by option: transformers' own; torch's FlashAttention on packed rows; a call for each sequence."""


@dataclasses.dataclass(frozen=True)
class Case:
    """Critics of one size side by side (``4b``, ``2x0.6b+nockpt``, ``14b/bf16``), and the rows they work on."""

    name: str
    model: Model
    count: int
    is_full: bool  # fp32 weights, gradients and AdamW; otherwise weights and gradients in bf16 and no optimizer step
    options: frozenset[str] = frozenset()
    length: int = 4096  # response tokens of a row
    rows: int = 8
    tokens: int = 17_408  # most tokens of a micro-batch to train on; one to evaluate holds twice as many

    @classmethod
    def parse(cls, name: str) -> "Case":
        match = re.fullmatch(r"(?:([1-9]\d*)x)?([\w.]+?)(/bf16)?((?:\+\w+)*)", name)
        options = frozenset(match[4].split("+")[1:]) if match else frozenset()
        sizes = [option for option in options if re.fullmatch(r"[1-9]\d*k", option)]
        unknown = sorted(options - {*OPTIONS, *ATTENTION, *sizes})
        if not match or match[2] not in SHAPES or unknown or len(sizes) > 1:
            raise argparse.ArgumentTypeError(
                f"{name!r} is no case; write SIZE, NxSIZE or NxSIZE/bf16 with one of {', '.join(SHAPES)}, and behind it "
                f"+OPTION, any of {', '.join([*OPTIONS, *ATTENTION])}, or +Nk"
            )
        case = cls(name, SHAPES[match[2]].as_critic(), int(match[1] or 1), not match[3], options)
        return dataclasses.replace(case, tokens=int(sizes[0][:-1]) * 1024) if sizes else case

    def micro_batches(self, phase: str, index: int) -> list[int]:
        """Rows of each micro-batch of critic ``index``: all rows to evaluate, every M-th to train on."""
        rows = self.rows if phase == "evaluation" else len(range(index, self.rows, self.count))
        most = self.tokens * (2 if phase == "evaluation" else 1) // (PROMPT + self.length)
        return [min(most, rows - start) for start in range(0, rows, most)]

    def floor(self, phase: str) -> tuple[float, float]:
        """Operations, and bytes moved, that a phase cannot do without.

        Bytes: bf16 weights in every pass over a micro-batch, one to evaluate and three to train (two without checkpointing),
        where gradients are read and written too; AdamW reads and writes weights and moments and reads gradients.
        """
        flops = moved = 0.0
        weights = self.model.params - self.model.embedding  # of the embedding only the rows in use have to move
        recompute = "nockpt" not in self.options
        for index in range(self.count):
            batches = self.micro_batches(phase, index)
            tokens, squares = (sum(batches) * (PROMPT + self.length) ** power for power in (1, 2))
            if phase == "evaluation":
                flops += self.model.forward_flops(tokens, squares)
                moved += weights * 2 * len(batches)
            else:
                flops += self.model.training_flops(tokens, squares, recompute)
                gradients, adamw = (8, 28) if self.is_full else (4, 0)
                moved += weights * (4 + 2 * recompute + gradients) * len(batches) + self.model.params * adamw
        return flops, moved
