"""The benchmarks run, and what they count is what they say they count."""

import argparse
import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist


def benchmark(root: Path, name: str) -> ModuleType:
    if str(root / "benchmarks") not in sys.path:
        sys.path.append(str(root / "benchmarks"))  # a benchmark finds its parts beside it
    spec = importlib.util.spec_from_file_location(name, root / f"benchmarks/{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # a dataclass in it looks itself up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def critic_cost(root) -> ModuleType:
    return benchmark(root, "critic_cost")


CPU = ["--device", "cpu", "--cases", "2xtiny"]


def last_line(root, *command: str, timeout: int = 240) -> dict:
    run = subprocess.run([sys.executable, *command], cwd=root, capture_output=True, text=True, timeout=timeout)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


# -- critic_cost ---------------------------------------------------------------------------------------------------


def case_of(critic_cost: ModuleType, name: str, **settings: int):
    return dataclasses.replace(critic_cost.Case.parse(name), **settings)


def test_cases_are_read_and_refused(critic_cost):
    case = critic_cost.Case.parse("2x0.6b")
    assert (case.count, case.model.name, case.model.value_head, case.is_full) == (2, "Qwen3-0.6B", True, True)
    assert not critic_cost.Case.parse("14b/bf16").is_full
    case = critic_cost.Case.parse("2x1.7b/bf16+nockpt+9k")
    assert (case.count, case.options, case.tokens) == (2, {"nockpt", "9k"}, 9216)
    # Of four rows of 4352 tokens two fit to train on, four to evaluate; 17,408 tokens are all of them.
    assert case.micro_batches("update", 0) == [2, 2] and case.micro_batches("evaluation", 0) == [4, 4]
    assert critic_cost.Case.parse("2x1.7b/bf16+nockpt").micro_batches("update", 0) == [4]
    for name in ("5b", "0x4b", "x4b", "4b/fp8", "4b+fast", "4b+", "4b+9k+8k"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"SIZE.*0.6b"):
            critic_cost.Case.parse(name)


def test_micro_batches_by_hand(critic_cost):
    # Rows of 256 + 744 = 1000 tokens, seven of them: to train on 4 and 3 of them in micro-batches of at most 3,
    # to evaluate all of them in micro-batches of at most 6.
    case = case_of(critic_cost, "2xtiny", length=744, rows=7, tokens=3500)
    assert case.micro_batches("update", 0) == [3, 1] and case.micro_batches("update", 1) == [3]
    assert case.micro_batches("evaluation", 0) == case.micro_batches("evaluation", 1) == [7]
    assert case_of(critic_cost, "tiny", length=744, rows=7, tokens=3000).micro_batches("evaluation", 0) == [6, 1]


def test_floor_by_hand(critic_cost):
    # The tiny shape: hidden 64, MLP 128, 2 layers, 4 heads and 2 key heads of 16, vocabulary 512.
    matrices = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128  # q, k and v, o, MLP
    layer = matrices + 2 * 64 + 2 * 16  # with its norms
    body, embedding = 2 * layer + 64 + 65, 512 * 64  # and the last norm, and the value head with its bias
    case = case_of(critic_cost, "2xtiny", length=744, rows=4, tokens=1000)
    # Each critic trains on 2 rows, one a micro-batch, and evaluates 4, two a micro-batch.
    forward = 2 * 2 * matrices + 2 * 64  # a token
    attention = 2 * 2 * 64 * 1000**2  # a row: 2 layers, width 64, half of the square, 2 products of 2 operations
    flops, moved = case.floor("evaluation")
    assert flops == 2 * 4 * (1000 * forward + attention)
    assert moved == 2 * 2 * 2 * body  # critics, micro-batches, bytes
    # Forward, backward of twice that, and the layers once more but for the MLP's last matrix.
    training = 2 * 2 * (4 * matrices - 64 * 128) + 3 * 2 * 64
    flops, moved = case.floor("update")
    assert flops == 2 * 2 * (1000 * training + 4.5 * attention)
    assert moved == 2 * (2 * 14 * body + 28 * (body + embedding))
    assert case_of(critic_cost, "2xtiny/bf16", length=744, rows=4, tokens=1000).floor("update")[1] == 2 * 2 * 10 * body
    # Without checkpointing, each matrix three times, and one pass less over the weights.
    flops, moved = case_of(critic_cost, "2xtiny/bf16+nockpt", length=744, rows=4, tokens=1000).floor("update")
    assert flops == 2 * 2 * (1000 * 3 * forward + 3.5 * attention) and moved == 2 * 2 * 8 * body


@pytest.mark.parametrize("name", ["tiny", "0.6b", "1.7b", "4b", "14b"])
def test_a_value_model_has_the_parameters_that_the_floor_counts(critic_cost, name):
    """The true shapes, built by transformers without memory for their weights."""
    case = critic_cost.Case.parse(f"{name}/bf16")
    (model,) = critic_cost.build(case, "meta")
    assert sum(weight.numel() for weight in model.parameters()) == case.model.params
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_known_cards_have_their_data_sheets_peaks(critic_cost, monkeypatch):
    for name, flops, bandwidth in (
        ("NVIDIA H100 80GB HBM3", 989e12, 3.35e12),
        ("NVIDIA H200", 989e12, 4.8e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 2.0e12),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        found = critic_cost.card("cuda")
        assert found["peaks"] == "data sheet"
        assert (found["flops"], found["bandwidth"]) == pytest.approx((flops, bandwidth), rel=0.03)


def test_rates_follow_from_the_measured_seconds(critic_cost):
    case = case_of(critic_cost, "tiny", length=744, rows=4, tokens=4000)
    flops, moved = case.floor("update")
    peak = {"flops": 2 * flops, "bandwidth": moved / 3}
    row = critic_cost.with_rates(case, {"phase": "update", "all_seconds": [4.0, 9.0, 5.0], "gib": 1.5}, peak)
    assert (row["s"], row["min"], row["max"], row["tokens/s"], row["GiB"]) == (5, 4, 9, 800, 1.5)
    assert row["of-peak"] == pytest.approx(0.1) and row["TFLOP/s"] == pytest.approx(flops / 5e12)
    assert row["floor-s"] == pytest.approx(3), "the traffic takes longer than the work"
    assert critic_cost.with_rates(case, {"phase": "update", "error": "out of memory"}, peak)["error"] == "out of memory"


def test_an_update_trains_every_critic(critic_cost):
    """Without AdamW the weights stay, but a gradient must have reached the head of each critic."""
    case = case_of(critic_cost, "2xtiny/bf16", length=16, rows=4, tokens=600)
    models = critic_cost.build(case, "cpu")
    seen = []
    for index, model in enumerate(models):
        model.score.weight.register_post_accumulate_grad_hook(
            lambda weight, index=index: seen.append((index, bool(weight.grad.any())))
        )
    critic_cost.update(models, [], critic_cost.Batch(case, "cpu"))
    assert seen == [(0, True), (1, True)]


@pytest.mark.e2e
def test_critic_cost_runs_on_a_cpu(root):
    """An option that cannot be had is a row with its error."""
    command = [*CPU[:2], "--cases", "2xtiny", "2xtiny+cudnn", "--lengths", "32", "--rows", "4"]
    *found, failed = last_line(root, "benchmarks/critic_cost.py", *command)["rows"]
    rows = {row["phase"]: row for row in found}
    assert set(rows) == {"update", "evaluation"} and not any("error" in row for row in rows.values())
    assert all(len(row["all_seconds"]) == 3 and min(row["all_seconds"]) == row["min"] > 0 for row in rows.values())
    assert failed["case"] == "2xtiny+cudnn" and failed["phase"] == "update" and "No viable backend" in failed["error"]


def test_options_change_what_a_critic_costs_and_not_what_it_is(critic_cost, capsys):
    """Norm of the first gradients and size of the values."""
    names = ["2xtiny", "2xtiny+nockpt+keep+foreach", "2xtiny+copy+head+1k", "2xtiny+stack", "2xtiny+each"]
    checks = {}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for name in names:
            critic_cost.measure(case_of(critic_cost, name, length=32, rows=4), "cpu", repeats=1)
            for line in map(json.loads, capsys.readouterr().out.splitlines()):
                checks[name, line["phase"]] = line["check"]
        plain, bare, head, stacked, each = (critic_cost.build(case_of(critic_cost, name), "cpu") for name in names)
    finally:
        dist.destroy_process_group()
    assert len(checks) == 2 * len(names) and all(check > 0 for check in checks.values())
    for (name, phase), check in checks.items():
        assert check == pytest.approx(checks["2xtiny", phase], rel=0.01), name
    assert plain[0].is_gradient_checkpointing and not bare[0].is_gradient_checkpointing
    assert len(plain) == 2 and len(stacked) == 1 and each[0].config._attn_implementation == "each"
    assert head[0].score._forward_pre_hooks and not plain[0].score._forward_pre_hooks


def test_a_case_that_takes_too_long_is_stopped(critic_cost, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["critic_cost.py", *CPU, "--lengths", "32", "--rows", "4"])
    _, (case,) = critic_cost.read_arguments()
    (row,) = critic_cost.table([case], {}, limit=0.01)
    assert (row["phase"], row["error"]) == ("update", "stopped after 0.01 s")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "300", "--lengths", "64"], "--tokens 300 holds no row of 320 tokens"),
        (["--rows", "1"], "--rows 1 leaves one of 2 critics without a row"),
    ],
)
def test_critic_cost_refuses_rows_that_fit_nowhere(critic_cost, monkeypatch, capsys, options, message):
    monkeypatch.setattr(sys, "argv", ["critic_cost.py", *CPU, *options])
    with pytest.raises(SystemExit) as refused:
        critic_cost.read_arguments()
    assert refused.value.code == 2 and message in capsys.readouterr().err


# -- driver_overhead -----------------------------------------------------------------------------------------------


@pytest.mark.e2e
def test_driver_overhead_runs_the_trainers_hooks(root):
    result = last_line(root, "benchmarks/driver_overhead.py", "--exponents", "20", "--repeats", "2")
    low, high = result["spread_seconds"]
    assert result["tokens"] == 1 << 20 and 0 < low <= result["seconds"] <= high
    assert result["peak_gib"] == max(result["stage_peak_gib"])
    # Two critics' values fetched and stacked, their mean and sigma: 24 bytes a token at the very least, and not 500.
    assert 24 * 2**20 < result["peak_gib"] * 2**30 < 500 * 2**20
    # A fifth of the response tokens, whose floor is off by at most one token.
    assert result["masked"] == pytest.approx([0.2, 0.2], abs=1e-6)


# -- step_time -----------------------------------------------------------------------------------------------------


def steps(**phases: list[float]) -> list[dict[str, float]]:
    """Metrics of steps with these seconds."""
    return [
        {f"timing_s/{name}": value for name, value in zip(phases, step, strict=True)}
        for step in zip(*phases.values(), strict=True)
    ]


def test_step_time_compares_medians(root):
    step_time = benchmark(root, "step_time")
    measured = {
        "grpo": steps(step=[4.0, 5.0, 90.0], adv=[0.0, 0.0, 0.0]),
        "ppo": steps(
            step=[9.0, 10.0, 11.0], values=[1.0, 1.0, 1.0], adv=[0.5, 0.5, 0.5], update_critic=[3.0, 2.5, 3.5]
        ),
        "asyppo": steps(
            step=[6.0, 6.0, 6.0], values=[0.5, 0.5, 0.5], adv=[0.1, 0.1, 0.1], update_critic=[1.2, 1.2, 1.2]
        ),
    }
    result = step_time.result(measured, generation=5.0)
    assert (result["ppo_over_grpo"], result["asyppo_over_grpo"]) == (2.0, 1.2)
    assert result["asyppo_critic_over_ppo_critic"] == pytest.approx(1.8 / 4.5, abs=1e-3)
    assert result["asyppo_over_grpo_with_generation"] == 1.1
    lines = {line.split()[0]: line for line in step_time.table(measured).splitlines()}
    assert "5.000 (4.00-90.00)" in lines["total"] and "x2.00" in lines["total"] and "x1.20" in lines["total"]
    assert "4.500 (4.00-5.00)" in lines["critics"]


def test_the_actor_of_step_time_is_eight_times_a_critic(root):
    from recipe.asyppo.toy.make_toy import build_model, build_tokenizer

    step_time, tokenizer = benchmark(root, "step_time"), build_tokenizer()
    actor, critic = (
        sum(p.numel() for name, p in build_model(shape, tokenizer, 0).model.layers.named_parameters() if p.ndim == 2)
        for shape in (step_time.ACTOR, step_time.CRITIC)
    )
    assert actor == 8 * critic


@pytest.mark.e2e
@pytest.mark.timeout(1200)
def test_step_time_trains_with_and_without_critics(root):
    result = last_line(
        root,
        "benchmarks/step_time.py",
        *("--rounds", "1", "--steps", "2", "--skip", "1", "--length", "16", "--only", "grpo", "asyppo"),
        timeout=1100,
    )
    assert result["steps"] == {"grpo": 1, "asyppo": 1}
    assert all(value > 0 for value in result["seconds"].values())
    assert result["critic_seconds"]["asyppo"] > result["critic_seconds"]["grpo"]
    assert {"asyppo_over_grpo", "asyppo_over_grpo_with_generation"} <= result.keys()


# -- soak ----------------------------------------------------------------------------------------------------------


def test_soak_tells_growth_from_a_start_that_is_slow(root):
    soak = benchmark(root, "soak")
    looks = list(range(1, 101))
    assert soak.growth(looks, [100 + 0.5 * step for step in looks]) == pytest.approx(50)
    assert soak.growth(looks, [min(100.0, 5.0 * step) for step in looks]) == pytest.approx(0)
    assert soak.role(["ray::TaskRunner.run()"]) == "TaskRunner"
    assert soak.role(["/x/python", "-m", "verl.trainer.main_ppo", "a=b"]) == "verl.trainer.main_ppo"
    assert soak.role(["/x/raylet", "--y"]) == "raylet"


@pytest.mark.e2e
@pytest.mark.alone
@pytest.mark.timeout(600)
def test_a_run_leaves_nothing_behind(root, toy):
    """Processes, shared memory, sockets, temporary folders; growth cannot be judged in so few steps."""
    result = last_line(root, "benchmarks/soak.py", *("--steps", "6", "--limit", "1e6", "--toy", str(toy)), timeout=500)
    assert result["steps"] == 6
    assert result["left"] == {"processes": [], "shared_memory": [], "sockets": [], "temporary_files": []}
    assert {"TaskRunnerV1", "WorkerDict", "SimpleStorageUnit", "open files"} <= result["growth_per_100_steps"].keys()


def test_a_kept_step_is_timed_and_counted(root, monkeypatch, capsys):
    options = ["--prompts", "4", "--length", "64", "--repeats", "2", "--step-seconds", "10"]
    inspection = benchmark(root, "inspection")
    monkeypatch.setattr(sys, "argv", ["inspection.py", *options])
    monkeypatch.setattr(inspection.batch_io, "tq", None)  # the benchmark puts its own there
    inspection.main()
    result = json.loads(capsys.readouterr().out)
    assert result["tokens"] == 2 * 16 * 64
    assert result["share"] == pytest.approx(result["seconds"] / 10, abs=1e-4)


# -- plan_error ----------------------------------------------------------------------------------------------------


def test_the_plan_is_near_what_was_measured(root):
    """Critics from 0.6B to 4B on one H200, whose shares of the peak were 15 % to 53 %: seconds and memory."""
    plan_error = benchmark(root, "plan_error")
    for critics, measured in plan_error.CRITICS.items():
        for found, plan in zip(measured, plan_error.planned(*critics), strict=True):
            assert abs(plan / found - 1) < 0.15, (critics, found, plan)
    last = last_line(root, "benchmarks/plan_error.py")
    assert last["largest_error"] < 0.15 and abs(last["errors_of_a_step"]["actor update"]) < 0.15
