"""Where the weights of an evaluation come from, and which checkpoints are refused before Ray starts."""

import os
import shutil
from pathlib import Path

import pytest

from recipe.asyppo.evaluation.checkpoints import locate


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The files of a run folder whose checkpoint was written by two ranks; the shards are empty."""
    actor = tmp_path / "run/checkpoints/global_step_7/actor"
    (actor / "huggingface").mkdir(parents=True)
    (actor / "huggingface/config.json").write_text("{}")
    (actor / "fsdp_config.json").write_text('{"world_size": 2}')
    for rank in range(2):
        (actor / f"model_world_size_2_rank_{rank}.pt").touch()
    (tmp_path / "run/checkpoints/latest_checkpointed_iteration.txt").write_text("7")
    return actor.parent


def test_a_run_a_checkpoint_and_an_actor_name_the_same_weights(checkpoint):
    run = checkpoint.parent.parent
    sources = {locate(str(path)) for path in (run, checkpoint.parent, checkpoint, checkpoint / "actor")}
    assert len(sources) == 1
    (source,) = sources
    assert source.is_sharded and source.path == str(checkpoint / "actor")
    assert source.default_out == run / "evaluation/global_step_7"


def test_the_folder_that_verl_saves_to_has_any_name(checkpoint):
    saved = checkpoint.parent.rename(checkpoint.parent.with_name("saved"))
    assert locate(str(saved)).path == f"{saved}/global_step_7/actor"


def test_a_model_folder_is_taken_as_it_is(toy):
    source = locate(str(toy / "actor"))
    assert (source.path, source.is_sharded) == (str(toy / "actor"), False)
    assert source.default_out == Path("runs/evaluation/actor")


def test_full_weights_inside_a_checkpoint_are_preferred(checkpoint, toy):
    """With actor.checkpoint.save_contents=[..., hf_model] nothing has to be merged."""
    shutil.copytree(toy / "actor", checkpoint / "actor/huggingface", dirs_exist_ok=True)
    source = locate(str(checkpoint))
    assert (source.path, source.is_sharded) == (str(checkpoint / "actor/huggingface"), False)
    assert source.default_out.name == "global_step_7"


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("actor/model_world_size_2_rank_1.pt", "incomplete: model_world_size_2_rank_1.pt missing"),
        ("actor/huggingface/config.json", "incomplete: huggingface/config.json missing"),
        ("actor/fsdp_config.json", "fsdp_config.json is missing"),
        ("actor", "actor does not exist"),
    ],
)
def test_a_partial_checkpoint_is_refused(checkpoint, lost, message):
    path = checkpoint / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ValueError, match=message):
        locate(str(checkpoint))


def test_a_lora_checkpoint_is_refused(checkpoint):
    """verl's merger would leave the adapter out, so that the base model would be evaluated."""
    (checkpoint / "actor/lora_train_meta.json").write_text("{}")
    with pytest.raises(ValueError, match="LoRA"):
        locate(str(checkpoint))


def test_a_folder_without_weights_is_refused(toy, tmp_path):
    shutil.copytree(toy / "actor", tmp_path / "actor")
    (tmp_path / "actor/model.safetensors").unlink()
    with pytest.raises(ValueError, match="no weights"):
        locate(str(tmp_path / "actor"))
    (tmp_path / "actor/model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(ValueError, match=r"lacks model-1.safetensors, which model.safetensors.index.json lists"):
        locate(str(tmp_path / "actor"))


def test_weights_that_are_cut_off_are_refused_and_left_over_indices_passed_over(toy, tmp_path):
    """transformers looks for model.safetensors first, whatever the index of another format says."""
    folder = shutil.copytree(toy / "actor", tmp_path / "actor")
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "gone-00001-of-00002.bin"}}')
    locate(str(folder))
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size * 2 // 3)
    with pytest.raises(ValueError, match=r"model.safetensors is corrupt"):
        locate(str(folder))


@pytest.mark.parametrize("target", ["/no/such/folder", "nowhere"])
def test_a_missing_target_is_refused(target):
    with pytest.raises(ValueError, match=f"{target} does not exist"):
        locate(target)


def test_critics_are_not_evaluated(checkpoint):
    shutil.copytree(checkpoint / "actor", checkpoint / "critic/critic_0")
    with pytest.raises(ValueError, match="critic_0/actor does not exist"):
        locate(str(checkpoint / "critic/critic_0"))
