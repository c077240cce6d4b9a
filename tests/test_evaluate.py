"""Evaluation: what is refused before Ray starts, verl's configuration, and a checkpoint evaluated for real."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pyarrow.parquet
import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer
from verl.trainer.ppo.reward import resolve_reward_manager_cls
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import validate_config
from verl.utils.dataset.rl_dataset import get_dataset_class

from recipe.asyppo.evaluation.checkpoints import as_huggingface, locate
from recipe.asyppo.evaluation.evaluate import count_problems, evaluate, length_override, read_settings
from recipe.asyppo.evaluation.whole_prompts import WholePrompts
from recipe.asyppo.run_folder import alone


def settings(**values: object) -> dict[str, str]:
    return {"reward": __file__, **{name: str(value) for name, value in values.items()}}


def test_problems_are_counted_before_ray_starts(toy, tmp_path):
    files = f"[{toy}/test.parquet,{toy}/test.parquet]"
    assert count_problems(settings(files=files)) == 512
    assert count_problems(settings(files=files, max_problems=10)) == 10
    with pytest.raises(ValueError, match=r"missing.parquet does not exist"):
        count_problems(settings(files=f"[{tmp_path}/missing.parquet]"))
    pd.DataFrame({"prompt": ["1+1="]}).to_parquet(tmp_path / "bare.parquet")
    with pytest.raises(ValueError, match="no column data_source"):
        count_problems(settings(files=f"[{tmp_path}/bare.parquet]"))
    text = pd.DataFrame({"prompt": ["1+1="], "data_source": ["x"], "reward_model": [{"ground_truth": "2"}]})
    text.to_parquet(tmp_path / "text.parquet")
    with pytest.raises(ValueError, match=r"the prompts in .*text.parquet are no messages"):
        count_problems(settings(files=f"[{tmp_path}/text.parquet]"))
    table = pyarrow.parquet.read_table(toy / "test.parquet").select(["prompt", "data_source", "reward_model"])
    messages = table["prompt"].cast(pyarrow.large_list(table["prompt"].type.value_type))  # as polars writes lists
    pyarrow.parquet.write_table(table.set_column(0, "prompt", messages), tmp_path / "large.parquet")
    assert count_problems(settings(files=f"[{tmp_path}/large.parquet]")) == 256
    (tmp_path / "empty.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty.parquet cannot be read as parquet"):
        count_problems(settings(files=f"[{tmp_path}/empty.parquet]"))


def test_what_cannot_begin_leaves_a_folder_as_it_is(toy, tmp_path):
    """No reward; or another evaluation, which must not take the settings of this one."""
    overrides = [f"data.val_files=[{toy}/test.parquet]", "reward.custom_reward_function.path="]
    with pytest.raises(ValueError, match="set REWARD"):
        evaluate(str(toy / "actor"), tmp_path / "out", [*overrides[:1], overrides[1] + "gone.py"])
    assert not (tmp_path / "out").exists()
    with alone(tmp_path / "out"), pytest.raises(SystemExit, match="a run is going on"):
        evaluate(str(toy / "actor"), tmp_path / "out", [*overrides[:1], overrides[1] + __file__])
    assert not [*(tmp_path / "out").iterdir()]


@pytest.mark.parametrize("platform", ["", "cpu"])
def test_the_script_is_a_valid_configuration_of_verl(root, toy, tmp_path, platform):
    """On GPUs as on a CPU verl accepts it; nothing but the actor and the rollout would be built, and nothing trained."""
    recorder, record = tmp_path / "python", tmp_path / "command"
    recorder.write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" > {record}\n')
    recorder.chmod(0o755)
    subprocess.run(
        ["bash", str(root / "scripts/evaluate.sh"), str(toy / "actor"), "data.val_max_samples=3"],
        env={**os.environ, "VERL_PLATFORM": platform, "VAL_FILES": f"{toy}/test.parquet", "PYTHON": str(recorder)}
        | {"REWARD": f"{root}/recipe/asyppo/toy/toy_reward.py", "K": "8", "N_GPUS": "2", "OUT": str(tmp_path / "out")},
        check=True,
    )
    words = record.read_text().split("\0")[:-1]
    assert words[:5] == ["-m", "recipe.asyppo.evaluation.evaluate", "--out", str(tmp_path / "out"), str(toy / "actor")]
    overrides = words[5:]
    assert read_settings(overrides) == {
        "k": "8",
        "temperature": "0.6",
        "top_p": "0.95",
        "max_response_length": "8192",
        "max_problems": "3",
        "reward": f"{root}/recipe/asyppo/toy/toy_reward.py",
        "files": f"[{toy}/test.parquet]",
    }
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=[f"actor_rollout_ref.model.path={toy}/actor", *overrides])
    assert not need_critic(config) and not need_reference_policy(config)
    validate_config(config, use_reference_policy=False, use_critic=False)
    assert config.trainer.val_only and config.trainer.resume_mode == "disable"
    assert resolve_reward_manager_cls(config).__name__ == "LabelledRewardManager"
    assert get_dataset_class(config.data).__name__ == "WholePrompts"
    assert (config.trainer.device == "cpu") == (platform == "cpu")


def test_a_prompt_that_would_be_cut_is_refused(toy):
    """verl keeps the end of it, and says so in a worker's log."""
    tokenizer = AutoTokenizer.from_pretrained(toy / "actor")

    def load(longest: int) -> WholePrompts:
        config = {
            "filter_overlong_prompts": True,
            "filter_overlong_prompts_workers": None,
            "max_prompt_length": longest,
        }
        return WholePrompts(f"{toy}/test.parquet", tokenizer, OmegaConf.create(config))

    assert len(load(16)) == 256
    with pytest.raises(ValueError, match=r"max_prompt_length=2 would cut 256 of 256 problems.*MAX_PROMPT"):
        load(2)


@pytest.mark.parametrize(
    ("config", "overrides", "limit"),
    [
        ({"max_position_embeddings": 4096}, [], 1100),
        ({"max_position_embeddings": 512}, [], 512),
        ({"text_config": {"max_position_embeddings": 512}}, [], 512),
        ({}, [], 1100),
        ({"max_position_embeddings": 4096}, ["actor_rollout_ref.rollout.max_model_len=2000"], None),
        (None, [], None),
    ],
)
def test_the_longest_sequence_is_planned_for_and_no_more(tmp_path, config, overrides, limit):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    overrides = [
        "data.max_prompt_length=100",
        "data.max_response_length=9",
        "data.max_response_length=1000",
        *overrides,
    ]
    wanted = [] if limit is None else [f"actor_rollout_ref.rollout.max_model_len={limit}"]
    assert length_override(str(tmp_path), overrides) == wanted


def greedy(model_folder: str | Path, prompts: list[str]) -> list[str]:
    """Answers of plain transformers, in verl's form: four tokens at most, special tokens left out."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    answers = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        tokens = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=tokenizer.eos_token_id)
        answers.append(tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True))
    return answers


@pytest.mark.e2e
def test_a_checkpoint_is_evaluated_for_real(root, toy, finished, tmp_path):
    """Greedy answers are those that plain transformers gives with the weights of the checkpoint, not of the base model."""
    run = tmp_path / "run"
    shutil.copytree(finished[0] / "checkpoints", run / "checkpoints")
    first = pd.read_parquet(toy / "test.parquet").reward_model[0]["ground_truth"]
    (tmp_path / "reward.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        f"    if ground_truth == {first!r}:\n"
        "        raise LookupError('the first one')\n"
        "    is_right = len(solution_str) % 2\n"
        "    return {'score': is_right - 0.5, 'acc': is_right, 'pred': solution_str, 'spread': 0.5}\n"
    )
    environment = {
        "VERL_PLATFORM": "cpu",
        "PYTHON": sys.executable,
        "VAL_FILES": f"{toy}/test.parquet",
        "REWARD": f"{tmp_path}/reward.py",
        "MAX_PROMPT": "16",
        "MAX_RESPONSE": "4",
        "K": "2",
        "TEMPERATURE": "0",
        "TOP_P": "1",
    }
    command = ["bash", str(root / "scripts/evaluate.sh"), str(run), "data.val_max_samples=64"]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    out = run / "evaluation/global_step_2"
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 128
    assert {path.name for path in out.iterdir()} >= {"results.md", "log"} and not (out / ".model").exists()

    answers = {sample["prompt"]: sample["response"] for sample in samples}
    assert len(answers) == 64 and all(answers[sample["prompt"]] == sample["response"] for sample in samples)
    with as_huggingface(locate(str(run)), tmp_path / "merged", tmp_path / "log") as merged:
        expected = greedy(merged, list(answers))
    from_base = greedy(toy / "actor", list(answers))

    def agree(others: list[str]) -> float:
        return sum(map(str.__eq__, answers.values(), others)) / len(answers)

    assert agree(expected) > 0.95 > 0.8 > agree(from_base)

    table = json.loads((out / "results.json").read_text())
    entry = table["benchmarks"]["toy_addition"]
    graded = [sample["response"] for sample in samples if sample["ground_truth"] != first]
    (note,) = table["notes"]
    assert f"{128 - len(graded)} of 128 responses count 0" in note and "with LookupError: the first one" in note
    right = sum(len(response) % 2 for response in graded) / 128
    assert 0 < len(graded) < 128
    assert [entry[name]["value"] for name in ("avg@2", "pass@2", "maj@2")] == pytest.approx([right] * 3)
    assert table["settings"]["temperature"] == "0"
    assert (out / "results.md").read_text().strip() in done.stdout

    # Done once: the same request reads what is there, another one is refused.
    before = (out / "samples.jsonl").stat().st_mtime_ns
    overrides = json.loads((out / "request.json").read_text())["overrides"]
    assert evaluate(str(run), None, overrides) == out
    assert (out / "samples.jsonl").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="holds another evaluation"):
        evaluate(str(run), None, [*overrides, "actor_rollout_ref.rollout.val_kwargs.n=3"])
    weights = run / "checkpoints/global_step_2/actor/model_world_size_1_rank_0.pt"
    written = weights.stat()
    os.utime(weights)
    with pytest.raises(ValueError, match="holds another evaluation"):
        evaluate(str(run), None, overrides)
    os.utime(weights, ns=(written.st_atime_ns, written.st_mtime_ns))
