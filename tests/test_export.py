"""Exported models are those of the checkpoint, bit for bit, and start new critics; what is missing is named."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import ray
import test_critics
import torch
import verl.utils.model
from test_critics import batch, same, start
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from verl.workers.engine_workers import TrainingWorker

from asyppo_verl import preflight, value_model
from asyppo_verl.checkpoint import find_checkpoint
from asyppo_verl.critic_worker import value_field, worker_config
from asyppo_verl.export import export, main

# -- checkpoints written here, in verl's files ---------------------------------------------------------------------


def save(model: torch.nn.Module, tokenizer_from: Path, folder: Path) -> None:
    """A checkpoint of one rank."""
    (folder / "huggingface").mkdir(parents=True)
    model.config.save_pretrained(folder / "huggingface")
    AutoTokenizer.from_pretrained(tokenizer_from).save_pretrained(folder / "huggingface")
    torch.save(model.state_dict(), folder / "model_world_size_1_rank_0.pt")
    (folder / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": 1}))


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory) -> Path:
    """A checkpoint with an actor and two mini-critics; copy it before changing it."""
    step = tmp_path_factory.mktemp("whole") / "global_step_3"
    save(AutoModelForCausalLM.from_pretrained(toy / "actor"), toy / "actor", step / "actor")
    for index in range(2):
        model = AutoModelForTokenClassification.from_pretrained(toy / "critic", num_labels=1)
        save(model, toy / "critic", step / "critic" / f"critic_{index}")
    return step


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def forget_the_head(path: Path) -> None:
    torch.save({name: value for name, value in torch.load(path).items() if name != "score.weight"}, path)


def count_two_ranks(folder: Path) -> None:
    (folder / "fsdp_config.json").write_text(json.dumps({"world_size": 2}))
    (folder / "model_world_size_1_rank_0.pt").rename(folder / "model_world_size_2_rank_0.pt")


WEIGHTS = "model_world_size_1_rank_0.pt"


@pytest.mark.parametrize(
    ("damage", "part", "message"),
    [
        (shutil.rmtree, "", "global_step_3 does not exist"),
        (
            lambda step: [shutil.rmtree(part) for part in step.iterdir()],
            "",
            "global_step_3 holds neither actor nor critic",
        ),
        (shutil.rmtree, "critic/critic_0", "global_step_3/critic holds critic_1 instead of critic_0;"),
        (count_two_ranks, "critic/critic_1", r"critic_1 is incomplete: model_world_size_2_rank_1\.pt missing"),
        (lambda part: (part / WEIGHTS).unlink(), "actor", f"actor is incomplete: {WEIGHTS} missing"),
        (
            lambda part: (part / "fsdp_config.json").unlink(),
            "actor",
            "actor is no complete .* fsdp_config.json is missing",
        ),
        (lambda part: cut(part / WEIGHTS), "critic/critic_0", f"critic_0/{WEIGHTS} cannot be read"),
        (
            lambda part: forget_the_head(part / WEIGHTS),
            "critic/critic_1",
            r"critic_1 does not fit .*\['score.weight'\]",
        ),
    ],
)
def test_what_is_missing_is_named_and_nothing_is_written(whole, tmp_path, damage, part, message):
    step = shutil.copytree(whole, tmp_path / "run" / whole.name)
    damage(step / part)
    with pytest.raises(ValueError, match=f"{step.parent}/.*{message}"):
        export(step, tmp_path / "new" / "out")
    assert not list(tmp_path.glob("new/*"))


def test_nothing_is_overwritten(whole, tmp_path):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(ValueError, match=f"{tmp_path} exists already"):
        export(whole, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_run_folder_stands_for_its_latest_checkpoint(tmp_path):
    for step in (3, 20, 100):
        (tmp_path / f"run/checkpoints/global_step_{step}").mkdir(parents=True)
    latest = tmp_path / "run/checkpoints/latest_checkpointed_iteration.txt"
    latest.write_text("20")
    for path in ("run", "run/checkpoints", "run/checkpoints/global_step_20"):
        assert find_checkpoint(tmp_path / path) == tmp_path / "run/checkpoints/global_step_20"
    assert find_checkpoint(tmp_path / "run/checkpoints/global_step_3").name == "global_step_3"
    latest.write_text("7")
    with pytest.raises(ValueError, match=r"names step '7', but there are checkpoints of the steps \[3, 20, 100\]"):
        find_checkpoint(tmp_path / "run")


def test_an_actor_alone_with_tied_embeddings(toy, tmp_path, monkeypatch, capsys):
    config = AutoConfig.from_pretrained(toy / "actor", tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config)
    save(model, toy / "actor", tmp_path / "global_step_1" / "actor")
    monkeypatch.setattr(sys, "argv", ["export", str(tmp_path / "global_step_1"), str(tmp_path / "out")])
    main()
    assert capsys.readouterr().out.splitlines() == [f"wrote {tmp_path}/out/actor", "the checkpoint holds no critic"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "actor")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert same(model.state_dict(), again.state_dict())


# -- checkpoints written by real workers ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster():
    yield from test_critics.cluster.__wrapped__()


@pytest.fixture
def started(cluster):
    """Start worker groups that end with the test."""
    groups: list[RayWorkerGroup] = []

    def register(group: RayWorkerGroup) -> RayWorkerGroup:
        groups.append(group)
        return group

    yield register
    for group in groups:
        for worker in group.workers:
            ray.kill(worker)


def on_responses(model: torch.nn.Module, data) -> torch.Tensor:
    """Outputs of plain transformers for all response tokens: position prompt + t - 1 speaks of response token t."""
    rows = zip(*(data[name].unbind() for name in ("input_ids", "prompts", "responses")), strict=True)
    with torch.no_grad():
        return torch.cat(
            [
                model(ids[None]).logits[0, len(prompt) - 1 : len(prompt) + len(response) - 1]
                for ids, prompt, response in rows
            ]
        )


def critic(folder: Path) -> torch.nn.Module:
    return AutoModelForTokenClassification.from_pretrained(folder).eval()


def saved_by_one_rank(folder: Path) -> dict[str, torch.Tensor]:
    saved = torch.load(folder / WEIGHTS, weights_only=False)
    return {name: value.to_local() for name, value in saved.items()}


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_exported_critics_give_the_values_of_the_run_and_start_the_next(started, compose, toy, tmp_path):
    trained = started(start(compose, 2))
    data = batch(20)
    for index in range(2):
        test_critics.train(trained, index, data)
    trained.save_checkpoint(str(tmp_path / "global_step_1" / "critic"), None, 1, None)
    assert export(tmp_path / "global_step_1", tmp_path / "out") == ["critic_0", "critic_1"]

    values = trained.infer_batch(data.copy()).get()
    weights = trained.weights()[0]
    for index in range(2):
        folder = tmp_path / "out" / f"critic_{index}"
        model = critic(folder)
        assert same(weights[index], model.state_dict())
        assert (
            AutoTokenizer.from_pretrained(folder).get_vocab()
            == AutoTokenizer.from_pretrained(toy / "actor").get_vocab()
        )
        # Not to the last bit, since the worker evaluates padded batches.
        expected = values[value_field(index)].values()
        torch.testing.assert_close(on_responses(model, data)[:, 0], expected, rtol=1e-5, atol=1e-6)

    paths = [
        f"critic.model.path={tmp_path}/out/critic_0",
        f"+asyppo.critic_overrides.1.model.path={tmp_path}/out/critic_1",
    ]
    preflight.prepare(compose(*paths))
    resumed = started(start(compose, 2, "critic.fsdp.fsdp_size=1", *paths))
    restored = resumed.weights()[0]
    assert all(same(a, b) for a, b in zip(weights, restored, strict=True)), "not even the heads are drawn anew"

    # Saved by ranks that hold everything each, the weights are again the same.
    resumed.save_checkpoint(str(tmp_path / "global_step_2" / "critic"), None, 2, None)
    export(tmp_path / "global_step_2", tmp_path / "again")
    for index in range(2):
        assert same(weights[index], critic(tmp_path / "again" / f"critic_{index}").state_dict())


class StockCritic(TrainingWorker):
    """verl's own critic, with an attention implementation that a CPU has."""

    def __init__(self, config) -> None:
        value_model.install(verl.utils.model)
        super().__init__(config)


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_critic_of_verl_is_exported_as_a_critic_though_its_configuration_says_causal_model(
    started, compose, tmp_path
):
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    group = RayWorkerGroup(
        resource_pool=RayResourcePool([1], use_gpu=True, max_colocate_count=3),
        ray_cls_with_init=RayClassWithInitArgs(cls=ray.remote(StockCritic), config=worker_config(compose().critic)),
        device_name="cpu",
    )
    started(group).reset()
    folder = tmp_path / "global_step_1" / "critic"
    group.save_checkpoint(str(folder), None, 1, None)
    assert AutoConfig.from_pretrained(folder / "huggingface").architectures == ["Qwen3ForCausalLM"]

    assert export(tmp_path / "global_step_1", tmp_path / "out") == ["critic"]
    model, loading = AutoModelForTokenClassification.from_pretrained(
        tmp_path / "out" / "critic", output_loading_info=True
    )
    assert not any(loading.values()) and model.config.architectures == ["Qwen3ForTokenClassification"]
    assert same(saved_by_one_rank(folder), model.state_dict())
