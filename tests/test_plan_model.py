"""The plan's counts are those of the real models: parameters, operations, and what a step holds in memory."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from recipe.asyppo.plan import memory
from recipe.asyppo.plan.model import BUILT_IN, from_config, read_model

PUBLISHED = {  # parameters of the checkpoints on the Hugging Face hub
    "0.6b": 596_049_920,
    "1.7b": 1_720_574_976,
    "4b": 4_022_468_096,
    "8b": 8_190_735_360,
    "14b": 14_768_307_200,
    "32b": 32_762_123_264,
}


def hf_config(model) -> Qwen3Config:
    return Qwen3Config(**model.shape, tie_word_embeddings=model.tied, num_labels=1)


def count(auto_class, config) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in auto_class.from_config(config).parameters())


@pytest.mark.parametrize("size", BUILT_IN)
def test_parameters_of_qwen3_are_those_of_the_real_models(size):
    model = read_model(f"Qwen/Qwen3-{size.upper()}-Base")
    assert model.params == PUBLISHED[size] == count(AutoModelForCausalLM, hf_config(model))
    assert model.as_critic().params == count(AutoModelForTokenClassification, hf_config(model))


SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_labels": 1,
}


@pytest.mark.parametrize(
    "config",
    [
        Qwen3Config(**SMALL, head_dim=16, attention_bias=True, tie_word_embeddings=True),
        Qwen2Config(**SMALL),
        LlamaConfig(**SMALL),
        LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    ],
)
def test_parameters_of_other_families(config):
    model = from_config(config, "small")
    assert model.params == count(AutoModelForCausalLM, config)
    assert model.as_critic().params == count(AutoModelForTokenClassification, config)


def test_a_folder_is_read_like_the_models_in_it(toy):
    for role, auto_class in (("actor", AutoModelForCausalLM), ("critic", AutoModelForCausalLM)):
        real = auto_class.from_pretrained(toy / role)
        assert read_model(str(toy / role)).params == sum(parameter.numel() for parameter in real.parameters())


LAYERS, TOKENS = 3, 192


def real_model(auto_class, hidden=128, intermediate=512, layers=LAYERS):
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        num_labels=1,
        attn_implementation="sdpa",
    )
    model = auto_class.from_config(config, dtype=torch.bfloat16)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, from_config(config, "real")


def flops(model, train: bool) -> tuple[int, int]:
    """Operations of one sequence as torch counts them: of parameters, and of products without any (attention, rotary)."""
    model.train(train)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(train):
        logits = model(input_ids=torch.zeros(1, TOKENS, dtype=torch.long), use_cache=False).logits
        if train:
            logits.float().sum().backward()
    by_operation = {str(name): number for name, number in counter.get_flop_counts()["Global"].items()}
    without = by_operation.pop("aten.bmm")
    return sum(by_operation.values()), without


@pytest.mark.parametrize(
    "auto_class, as_critic", [(AutoModelForCausalLM, False), (AutoModelForTokenClassification, True)]
)
def test_work_is_what_torch_counts(auto_class, as_critic):
    real, model = real_model(auto_class)
    real.set_attn_implementation("eager")
    model = model.as_critic() if as_critic else model
    rotary = TOKENS * model.head_dim
    matrices, attention = flops(real, train=False)
    assert model.forward_flops(TOKENS, 0) == matrices
    # Eager attention multiplies all pairs of positions, we count those that a causal mask leaves: half.
    assert 2 * model.forward_flops(0, TOKENS**2) == attention - rotary
    matrices, attention = flops(real, train=True)
    assert model.training_flops(TOKENS, 0) == matrices
    # Two forwards of 2 products and a backward of 4; flash attention has a fifth, the scores anew.
    assert 2 * model.training_flops(0, TOKENS**2) * 8 / 9 == attention - rotary


def peak_bytes(run) -> int:
    """The most that is allocated at once during ``run``, beyond what was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    held = highest = 0
    for event in sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return highest


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("hidden, intermediate, layers", [(128, 512, 2), (128, 512, 6), (256, 1024, 2)])
def test_activations_of_a_critic_are_as_measured(train, hidden, intermediate, layers):
    """Bytes that one more token takes, on a real model with checkpointing and autocast."""
    real, model = real_model(AutoModelForTokenClassification, hidden, intermediate, layers)
    real.train(train)
    for parameter in real.parameters():  # FSDP, too, takes gradients away as they come
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))

    def run(tokens):
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(train):
            values = real(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False).logits
        if train:
            values.float().sum().backward()

    run(8)
    measured = (peak_bytes(lambda: run(512)) - peak_bytes(lambda: run(256))) / 256
    working = memory.update_working if train else memory.forward_working
    planned = (working(model.as_critic(), 10**7 + 1000) - working(model.as_critic(), 10**7)) / 1000
    assert 0.95 * measured < planned < 1.15 * measured


@pytest.mark.parametrize("chunking", [False, True])
def test_a_logit_takes_what_verls_entropy_takes(chunking):
    """verl's compiled entropy, and its gradient, beside the logits; chunked, the update takes more with every chunk."""
    from verl.utils import torch_functional

    entropy = torch_functional.entropy_from_logits_with_chunking if chunking else torch_functional.entropy_from_logits
    compiled = torch.compile(entropy, dynamic=True)
    logits = torch.randn(1024, 2048).bfloat16().requires_grad_()
    options = {"chunk_size": 256} if chunking else {}

    def update():
        with torch.autocast("cpu", torch.bfloat16):
            torch.autograd.grad(compiled(logits, **options).sum(), logits)

    def forward():
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            compiled(logits, **options)

    measured = []
    for run in (update, forward):
        run()
        measured.append(peak_bytes(run) / logits.numel())
    assert measured[1] == pytest.approx(memory.ENTROPY_FORWARD[chunking], abs=0.1)
    assert 0.7 * memory.ENTROPY_UPDATE[chunking] < measured[0] < 1.02 * memory.ENTROPY_UPDATE[chunking]
