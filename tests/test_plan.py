"""A plan's memory, work and seconds follow from a model's counts by rules that are stated here once more."""

import dataclasses
import json
import math
import re
import subprocess
import sys

import pytest
import torch
from test_plan_model import PUBLISHED, hf_config
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from recipe.asyppo.plan import cost, memory
from recipe.asyppo.plan.__main__ import main
from recipe.asyppo.plan.model import read_model
from recipe.asyppo.plan.plan import Plan, fix
from recipe.asyppo.plan.settings import ALGORITHMS, GIB, Settings


def settings(actor="4b", critic="0.6b", **changes) -> Settings:
    return Settings(actor=read_model(actor), critic=read_model(critic).as_critic(), **changes)


def test_states_by_hand():
    plain = settings()
    # 16 bytes x 596,050,945 / 8 GPUs, and the same on groups of 2 GPUs
    assert memory.states(plain.critic, plain) == 16 * 596_050_945 / 8
    small_groups = settings(critic_fsdp_size=2)
    assert memory.states(small_groups.critic, small_groups) == 16 * 596_050_945 / 2
    assert memory.states(small_groups.actor, small_groups) == memory.states(plain.actor, plain)
    two = 2 * memory.states(plain.critic, plain)
    assert two / memory.states(plain.actor.as_critic(), plain) == pytest.approx(0.296, abs=1e-3)


def test_phases_by_hand():
    """14B actor with two 4B critics on eight H200: what stays between the phases, and what comes with each."""
    found = {phase.name: phase for phase in memory.phases(settings("14b", "4b", hardware="h200"), "asyppo")}
    actor, critic = PUBLISHED["14b"] / 8, (PUBLISHED["4b"] + 2561) / 8
    assert found["rollout"].vllm == 0.6 * 139.8 * GIB
    assert {phase.critics for name, phase in found.items() if name != "critic update"} == {2 * 12 * critic}
    assert found["critic update"].critics == 12 * critic + 16 * critic
    assert {phase.actor for name, phase in found.items() if name != "actor update"} == {12 * actor}
    assert found["actor update"].actor == 16 * actor
    logits = 18432 * 151_936 * 8
    assert found["actor update"].working > logits > found["critic update"].working


def test_offload_leaves_the_one_at_work():
    found = {phase.name: phase for phase in memory.phases(settings(actor_offload=True, critic_offload=True), "asyppo")}
    actor, critic = PUBLISHED["4b"] / 8, (PUBLISHED["0.6b"] + 1025) / 8
    assert (found["rollout"].actor, found["rollout"].critics) == (0, 0)
    assert (found["values"].actor, found["values"].critics) == (0, 4 * critic)
    assert (found["critic update"].actor, found["critic update"].critics) == (0, 16 * critic)
    assert (found["old log-probs"].actor, found["actor update"].actor) == (4 * actor, 16 * actor)
    assert found["actor update"].critics == 0


def pinned(auto_class, size: str, gpus: int) -> int:
    """Bytes that torch pins on a node for a model's shards: the next power of two of each, on the real model's shapes."""
    model = read_model(size)
    with torch.device("meta"):
        real = auto_class.from_config(hf_config(model))
    shards = [4 * -(-p.shape[0] // gpus) * p[0].numel() for p in real.parameters()]
    return gpus * sum(2 ** math.ceil(math.log2(size)) for size in shards)


def test_offloaded_models_are_pinned_in_powers_of_two():
    actor, critic = pinned(AutoModelForCausalLM, "4b", 8), pinned(AutoModelForTokenClassification, "0.6b", 8)
    host = memory.host_memory(settings(actor_offload=True, critic_offload=True), "asyppo")
    assert host == 3 * actor + 3 * 2 * critic
    assert memory.host_memory(settings(reference=True), "asyppo") == actor
    assert host > 12 * (PUBLISHED["4b"] + 2 * PUBLISHED["0.6b"])


def test_one_mini_critic_is_ppo():
    one = settings(num_critics=1, eager_critics=True)
    assert Plan(one, "asyppo").summary() == Plan(one, "ppo_small_critic").summary()
    own_size = settings(critic="4b", num_critics=1, eager_critics=True)
    assert Plan(own_size, "asyppo").summary() == Plan(own_size, "ppo").summary()
    assert cost.critic_share(cost.work(one, "grpo")) == 0


def test_mini_critics_evaluate_everything_and_share_the_training():
    two, four = (cost.work(settings(num_critics=number), "asyppo") for number in (2, 4))
    assert four["values"] == 2 * two["values"]
    assert four["critic update"] == pytest.approx(two["critic update"])
    small = cost.work(settings(), "ppo_small_critic")
    assert two["critic update"] == pytest.approx(small["critic update"])
    assert two["values"] == 2 * small["values"]
    assert cost.work(settings(update_critics_first=True), "asyppo") == two | {"values": 2 * two["values"]}


def test_compiled_critics_take_less_time_and_as_much_work():
    compiled, eager = settings(), settings(eager_critics=True)
    assert cost.work(compiled, "asyppo") == cost.work(eager, "asyppo")
    seconds, longer = (cost.seconds(one, "asyppo") for one in (compiled, eager))
    assert {name for name in seconds if seconds[name] < longer[name]} == {"values", "critic update"}
    assert cost.seconds(compiled, "ppo") == cost.seconds(eager, "ppo")
    slices = cost.seconds(settings(critic_sp=2), "asyppo")
    assert slices["values"] > longer["values"], "under sequence parallelism they are as verl builds them"


def test_share_of_two_small_critics():
    """A pass of each: (2 x 2 + 8) of 0.6B against (2 + 8) of 4B is 0.18 by parameters; attention and heads move it little."""
    parts = cost.work(settings(actor_epochs=1, critic_epochs=1), "asyppo")
    critics, actor = parts["values"] + parts["critic update"], parts["old log-probs"] + parts["actor update"]
    assert critics / actor == pytest.approx(0.19, abs=0.02)


def test_a_reference_adds_a_phase_and_host_memory_only():
    without, with_reference = (Plan(settings(reference=on), "asyppo") for on in (False, True))
    assert [phase for phase in with_reference.phases if phase.name != "reference"] == without.phases
    work = cost.work(with_reference.settings, "asyppo")
    assert work["reference"] == work["old log-probs"]
    assert memory.host_memory(with_reference.settings, "asyppo") > 4 * PUBLISHED["4b"]


def test_generation_by_hand():
    """One GPU, eight responses at once: 4096 steps read 4B weights in bf16, each token its cache of 144 KiB a position."""
    one = settings(gpus=1, prompts=1, responses=8, response_length=4096, bandwidth_use=1.0, actor_offload=True)
    weights = 4096 * 2 * PUBLISHED["4b"]
    cache = 8 * 4096 * (256 + 2048) * 36 * 8 * 128 * 2 * 2
    assert cost.seconds(one, "grpo")["generation"] == pytest.approx((weights + cache) / 3.35e12)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    "actor, critic", [("4b", "0.6b"), ("8b", "1.7b"), ("14b", "4b"), ("14b", "1.7b"), ("32b", "8b")]
)
@pytest.mark.parametrize("gpus", [4, 8])
def test_the_fix_makes_it_fit(actor, critic, gpus, algorithm):
    plan = Plan(settings(actor, critic, gpus=gpus, gpu_memory_utilization=0.85), algorithm)
    changes = fix(plan)
    assert (changes == {}) == plan.fits
    if changes is None:
        assert actor == "32b"
    else:
        assert Plan(dataclasses.replace(plan.settings, **changes), algorithm).fits


def test_the_search_for_a_fix_ends():
    """A cache that wants more of the card, and a rollout that wants less."""
    long = settings("32b", "4b", hardware="h200", response_length=24_576, actor_tokens=25_600)
    changes = fix(Plan(long, "asyppo"))
    assert changes is None or Plan(dataclasses.replace(long, **changes), "asyppo").fits


def test_a_cache_too_small_for_one_sequence_does_not_fit():
    plan = Plan(settings("32b", "4b", gpus=32, critic_offload=True, actor_offload=True), "asyppo")
    assert plan.cache_too_small and not plan.fits
    assert fix(plan)["gpu_memory_utilization"] == 0.8 or fix(plan)["tensor_parallel"] > 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--actor", "no/such/model"], "--actor: the model 'no/such/model' cannot be read"),
        (["--gpus", "0"], "--gpus=0 is not possible: give a number above 0"),
        (["--matrix-use", "1.5"], "--matrix-use=1.5 is not possible"),
        (["--tensor-parallel", "3"], "--tensor-parallel=3 is not possible: choose a divisor of the 8 GPUs"),
        (["--critic-fsdp-size", "3"], "--critic-fsdp-size=3 is not possible: choose -1 or a divisor"),
        (["--actor-tokens", "4096"], "at least 9216"),
        (["--mean-response-length", "9000"], "at most --response-length=8192"),
        (["--num-critics", "33"], "at most --responses=32"),
        (["--hardware", "b200"], "invalid choice: 'b200'"),
    ],
)
def test_errors_name_the_option_and_the_fix(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*([] if "--actor" in arguments else ["--actor", "4b"]), "--critic", "0.6b", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_family_that_cannot_be_counted_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="model_type=gpt2"):
        read_model(str(tmp_path))


def test_json_and_table_say_the_same(capsys):
    arguments = ["--actor", "Qwen/Qwen3-14B-Base", "--critic", "qwen3-4b"]
    main([*arguments, "--json"])
    found = json.loads(capsys.readouterr().out)["algorithms"]
    assert found == {name: Plan(settings("14b", "4b"), name).summary() for name in ALGORITHMS}
    main([*arguments, "--explain"])
    table = capsys.readouterr().out
    row = re.search(r"^  actor update +(\S+) +(\S+) +(\S+) +(\S+)$", table, re.MULTILINE).groups()
    assert row == tuple(f"{found[name]['phases_gib']['actor update']['total']:.1f}" for name in ALGORITHMS)
    assert all(line in table for line in (*memory.ASSUMPTIONS, *cost.ASSUMPTIONS))
    assert "asyppo: does not fit: rollout needs 79.3 of 73.1 GiB; it fits with --gpu-memory-utilization 0.5" in table


def test_it_needs_neither_torch_nor_transformers():
    code = (
        "import sys; from recipe.asyppo.plan.__main__ import main; main(['--actor', '4b', '--critic', '0.6b']); "
        "assert not {'torch', 'transformers', 'verl'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_seconds_by_hand():
    """A forward pass of one token of 0.6B on an H100: matrices at 0.75 of the peak, then 28 layers of norms and the like."""
    one = cost.Pass(read_model("0.6b").as_critic(), "forward", 1)
    matrices = 2 * 28 * (2 * 1024 * (2048 + 1024) + 3 * 1024 * 3072) + 2 * 1024
    moved = 28 * (1024 + 3072 + 2048 + 1024) * 112
    assert one.seconds(1, 0, settings()) == pytest.approx(matrices / 0.75 / 989.4e12 + moved / 3.35e12)
    attention = 2 * 28 * 2048 / 0.3 / 989.4e12  # of one pair of positions
    assert one.seconds(0, 1, settings()) == pytest.approx(attention)
