"""Runs side by side: figures by hand, the paired difference, and what is said where a figure is missing."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from recipe.asyppo.evaluation import compare, results, score


def make_run(folder: Path, steps: list[dict], **config: object) -> Path:
    (folder / "hydra/.hydra").mkdir(parents=True)
    lines = [json.dumps({"step": index + 1, "data": data}) for index, data in enumerate(steps)]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    (folder / "hydra/.hydra/config.yaml").write_text(json.dumps(config))
    return folder


def make_evaluation(folder: Path, right: dict[str, list[int]], k: int = 4, **settings: str) -> Path:
    """An evaluation in which problem i of a benchmark got ``right[benchmark][i]`` of k samples."""
    samples = [
        {"benchmark": name, "problem": f"{name}-{i}", "correct": j < count, "tokens": 5, "truncated": False}
        for name, counts in right.items()
        for i, count in enumerate(counts)
        for j in range(k)
    ]
    folder.mkdir(parents=True)
    (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    table = {"target": str(folder), "settings": {"k": str(k), **settings}, **results.evaluate(samples)}
    (folder / "results.json").write_text(json.dumps(table))
    return folder


def step(seconds: float, reward: float, **more: float) -> dict:
    return {"timing_s/step": seconds, "critic/score/mean": reward, **more}


def test_training_figures_by_hand():
    critic = {"timing_s/values": 1.0, "timing_s/update_critic": 2.0}
    steps = [
        step(30, 0.1, **critic, **{"actor/perf/max_memory_allocated_gb": 7, "perf/throughput": 10}),
        step(10, 0.2, **critic, **{"critic/perf/max_memory_allocated_gb": 9, "perf/throughput": 40}),
        step(12, 0.6, **critic, **{"perf/throughput": 30}),
    ]
    assert compare.training(steps) == pytest.approx(
        {
            "steps": 3,
            "reward_start": 0.1,
            "reward_end": 0.6,
            "step_seconds": 12,
            "critic_share": 0.25,
            "memory_gb": 9,
            "tokens_per_second": 30,
        }
    )


def test_a_run_without_a_critic_shows_that_it_has_no_such_figure(tmp_path):
    asyppo = make_run(
        tmp_path / "a",
        [step(10, 0.5, **{"timing_s/values": 1, "timing_s/update_critic": 1})],
        algorithm={"adv_estimator": "asyppo"},
        asyppo={"num_critics": 2},
    )
    grpo = make_run(tmp_path / "b", [step(8, 0.25)], algorithm={"adv_estimator": "grpo"})
    table = compare.markdown(compare.compare([asyppo, grpo]))
    assert "| a | asyppo, M = 2 | 1 | 0.500 | 0.500 | 10.00 | 20.0% | - | - |" in table
    assert "| b | grpo | 1 | 0.250 | 0.250 | 8.00 | - | - | - |" in table
    assert "avg@k" not in table and "minus" not in table


def test_a_resumed_run_that_goes_on_has_all_its_steps(tmp_path):
    run = make_run(tmp_path / "run", [step(1, r) for r in (0.1, 0.2, 0.3)], algorithm={"adv_estimator": "grpo"})
    (run / "metrics.jsonl").rename(run / "metrics.history.jsonl")
    assert compare.load(run)["training"]["steps"] == 3


def test_the_latest_evaluation_of_a_run_is_shown(tmp_path):
    run = make_run(tmp_path / "run", [step(1, 0)], algorithm={"adv_estimator": "asyppo"})
    for number, right in ((9, 1), (10, 3)):
        make_evaluation(run / f"evaluation/global_step_{number}", {"sums": [right]})
    (entry,) = compare.compare([run])
    assert entry["evaluation"]["step"] == 10
    assert "| run | 10 | 4 | 75.0 [75.0, 75.0] | 75.0 [75.0, 75.0] |" in compare.markdown([entry])


def test_the_difference_is_paired(tmp_path):
    """One more right answer on every problem: the difference is exactly 1/4, however much the problems differ."""
    counts = np.random.default_rng(0).integers(0, 4, size=40)
    base = make_evaluation(tmp_path / "base", {"sums": counts.tolist()})
    better = make_evaluation(tmp_path / "better", {"sums": (counts + 1).tolist()})
    first, second = compare.compare([base, better])
    assert first["difference"] == {}
    assert second["difference"]["sums"] == {"value": 0.25, "low": 0.25, "high": 0.25}
    own = second["evaluation"]["benchmarks"]["sums"]["avg@4"]
    assert own["high"] - own["low"] > 0.1
    assert "| better | +25.0 [+25.0, +25.0] | +25.0 [+25.0, +25.0] |" in compare.markdown([first, second])


def test_the_difference_does_not_depend_on_the_order_of_problems(tmp_path):
    a, b = {"x": [1, 4], "y": [3, 4]}, {"y": [2, 4], "x": [4, 4]}
    runs = [{"settings": {}, "problems": {"sums": problems}} for problems in (a, b)]
    assert compare.difference(runs[1], runs[0])["sums"]["value"] == pytest.approx((3 / 4 - 1 / 4) / 2)


def test_the_sign_and_the_interval_of_a_difference(tmp_path):
    """Against a bootstrap in a plain loop."""
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 5, size=(2, 60))
    base = make_evaluation(tmp_path / "base", {"sums": a.tolist()})
    other = make_evaluation(tmp_path / "other", {"sums": b.tolist()})
    found = compare.compare([base, other])[1]["difference"]["sums"]
    differences = (b - a) / 4
    draws = [differences[rng.integers(0, 60, size=60)].mean() for _ in range(score.DRAWS)]
    assert found["value"] == pytest.approx(differences.mean())
    np.testing.assert_allclose([found["low"], found["high"]], np.quantile(draws, [0.025, 0.975]), atol=0.02)


@pytest.mark.parametrize(
    ("right", "settings", "reason"),
    [
        ({"sums": [1, 2, 3]}, {"temperature": "1"}, "1 problems of sums are in one of them only"),
        ({"sums": [1, 2]}, {"temperature": "0.6"}, "temperature is 0.6, not 1"),
        ({"sums": [1, 2]}, {"temperature": "1", "reward": "/a/lenient.py"}, "reward is lenient.py, not reward.py"),
        ({"products": [1, 2]}, {"temperature": "1"}, "only one of them has sums, only one of them has products"),
    ],
)
def test_there_is_no_difference_between_what_cannot_be_compared(tmp_path, right, settings, reason):
    base = make_evaluation(tmp_path / "base", {"sums": [1, 2]}, temperature="1", reward="/a/reward.py")
    other = make_evaluation(tmp_path / "other", right, **({"reward": "/another/place/reward.py"} | settings))
    runs = compare.compare([base, other])
    assert runs[1]["difference"] == {}
    assert f"\n* other: no difference to base: {reason}" in compare.markdown(runs)


def test_a_run_without_an_evaluation_has_no_difference_and_says_so(tmp_path):
    run = make_run(tmp_path / "run", [step(1, 0)], algorithm={"adv_estimator": "asyppo"})
    model = make_evaluation(tmp_path / "model", {"sums": [1]})
    assert "* model: no difference to run: one of them has no evaluation" in compare.markdown(
        compare.compare([run, model])
    )


def test_the_average_that_is_missing_has_a_reason(tmp_path):
    base = make_evaluation(tmp_path / "base", {"sums": [1, 2]}, temperature="1")
    mixed = make_evaluation(tmp_path / "mixed", {"sums": [1, 2]}, temperature="1.0")
    other = make_evaluation(tmp_path / "other", {"products": [1]}, k=2)
    tables = [json.loads((path / "results.json").read_text()) for path in (mixed, other)]
    samples = [sample for path in (mixed, other) for sample in results.read_lines(path / "samples.jsonl")]
    (mixed / "results.json").write_text(json.dumps(tables[0] | results.evaluate(samples)))
    table = compare.markdown(compare.compare([base, mixed]))
    assert "* mixed: no average of avg@k and maj@k: k differs (products 2, sums 4)" in table
    assert "* mixed: no difference to base: only one of them has products" in table
    assert "| mixed | +0.0 [+0.0, +0.0] |" in table


def test_only_common_benchmarks_enter_the_average_difference(tmp_path):
    base = make_evaluation(tmp_path / "base", {"sums": [0, 0], "products": [4]})
    other = make_evaluation(tmp_path / "other", {"sums": [4, 4], "powers": [0]})
    difference = compare.compare([base, other])[1]["difference"]
    assert set(difference) == {"sums", "average"} and difference["average"]["value"] == 1


def test_more_samples_of_the_same_problems_can_be_compared(tmp_path):
    base = make_evaluation(tmp_path / "base", {"sums": [2]}, k=4)
    other = make_evaluation(tmp_path / "other", {"sums": [6]}, k=8)
    assert compare.compare([base, other])[1]["difference"]["sums"]["value"] == 0.25


def test_an_evaluation_alone_has_no_estimator(tmp_path):
    """verl's configuration lies beside it as in a run folder, and names one."""
    run = make_run(tmp_path / "run", [step(1, 0)], algorithm={"adv_estimator": "asyppo"})
    model = make_evaluation(tmp_path / "model", {"sums": [1]})
    (model / "hydra/.hydra").mkdir(parents=True)
    (model / "hydra/.hydra/config.yaml").write_text('{"algorithm": {"adv_estimator": "grpo"}}')
    runs = compare.compare([run, model])
    assert [entry["algorithm"] for entry in runs] == ["asyppo", None]
    assert "| model | - | - | - | - | - | - | - | - |" in compare.markdown(runs)


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    paths = [make_evaluation(tmp_path / part / "run", {"sums": [1]}) for part in ("x", "y")]
    assert [run["name"] for run in compare.compare(paths)] == [str(path) for path in paths]


def test_a_folder_without_figures_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} holds neither"):
        compare.load(tmp_path)


def test_the_command_prints_and_writes(root, tmp_path):
    run = make_run(tmp_path / "run", [step(10, 0.5), step(8, 0.75)], algorithm={"adv_estimator": "grpo"})
    out = tmp_path / "out.json"
    command = ["bash", str(root / "scripts/compare.sh"), str(run), "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "| run | grpo | 2 | 0.500 | 0.750 | 9.00 |" in done.stdout
    assert json.loads(out.read_text())[0]["training"]["reward_end"] == 0.75
    failed = subprocess.run([*command[:2], str(tmp_path / "nothing")], capture_output=True, text=True)
    assert failed.returncode == 1 and "nothing holds neither" in failed.stderr
