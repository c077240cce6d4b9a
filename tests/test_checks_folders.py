"""What the checks before Ray say of folders and checkpoints."""

import os
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from test_bad_input import complete, data, driver, refusal  # noqa: F401


def test_a_folder_that_cannot_be_written_is_refused_if_something_is_saved(complete, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(os, "access", lambda path, _mode: Path(path) != tmp_path)
    folder = f"trainer.default_local_dir={tmp_path}/deep/below"
    message = refusal(complete(folder, "trainer.save_freq=1"))
    assert f"default_local_dir={tmp_path}/deep/below: {tmp_path} is a file or cannot be written" in message
    driver(complete(folder))
    driver(complete(folder, "trainer.save_freq=1", "trainer.nnodes=2"))
    driver(complete(folder, "trainer.save_freq=1", "+ray_kwargs.ray_init.address=ray://elsewhere:10001"))
    assert not list(tmp_path.iterdir()), "nothing is made"


@pytest.mark.parametrize("files", ["data.train_files", "data.val_files"])
def test_prompts_of_plain_text_are_refused(complete, tmp_path, files):  # noqa: F811
    """Of "1+1=" Qwen3's chat template leaves the assistant's turn."""
    pd.DataFrame({"prompt": ["1+1="]}).to_parquet(tmp_path / "text.parquet")
    assert "the prompts in column 'prompt' are plain text" in refusal(complete(f"{files}={tmp_path}/text.parquet"))
    driver(complete(f"{files}={tmp_path}/text.parquet", "data.prompt_key=question"))
    driver(complete(f"{files}={tmp_path}/text.parquet", "actor_rollout_ref.rollout.agent.default_agent_loop=my_own"))
    pd.DataFrame({"prompt": ["1+1="], "agent_name": ["my_own"]}).to_parquet(tmp_path / "own.parquet")
    driver(complete(f"{files}={tmp_path}/own.parquet"))


@pytest.fixture
def resumed(complete, toy, tmp_path):  # noqa: F811
    """A configuration that resumes from a checkpoint of two ranks, of which the files of the given ones are here."""

    def composed(*overrides: str, seen: tuple[int, ...] = (0, 1)):
        step = tmp_path / "checkpoints" / "global_step_3"
        for folder, source in (("actor", "actor"), ("critic/critic_0", "critic"), ("critic/critic_1", "critic")):
            (step / folder / "huggingface").mkdir(parents=True)
            shutil.copy(toy / source / "config.json", step / folder / "huggingface")
            for begin in ("model", "optim", "extra_state"):
                for rank in seen:
                    torch.save({}, step / folder / f"{begin}_world_size_2_rank_{rank}.pt")
        torch.save({}, step / "data.pt")
        (step.parent / "latest_checkpointed_iteration.txt").write_text("3")
        return complete(*overrides)

    return composed


TWO_RANKS, TWO_NODES = "trainer.n_gpus_per_node=2", ("trainer.nnodes=2", "trainer.n_gpus_per_node=1")


def test_a_complete_checkpoint_is_accepted_without_a_word(resumed, caplog):
    driver(resumed(TWO_RANKS))
    assert "checkpoint" not in caplog.text


def test_a_checkpoint_without_the_position_in_the_data_begins_them_anew_as_in_verl(resumed, tmp_path, caplog):
    config = resumed(TWO_RANKS)
    (tmp_path / "checkpoints/global_step_3/data.pt").unlink()
    driver(config)
    assert "data.pt is not there: verl goes on from this checkpoint at the start of the training data" in caplog.text


@pytest.mark.parametrize("own", [(), ("+asyppo.critic_overrides.1.optim.lr=1",)])
def test_files_of_a_rank_that_are_missing_on_one_node_are_refused(resumed, own):
    message = refusal(resumed(TWO_RANKS, *own, seen=(0,)))
    assert "has no model_world_size_2_rank_1.pt" in message and "trainer.resume_mode=disable" in message


def test_files_of_other_nodes_are_left_to_their_ranks(resumed, tmp_path, caplog):
    """Disks may be a node's own: what can be seen is looked at, the rest is said."""
    driver(resumed(*TWO_NODES, seen=(0,)))
    assert "only part of the checkpoint is visible here: 1 of 2 ranks of" in caplog.text
    os.truncate(tmp_path / "checkpoints/global_step_3/critic/critic_1/optim_world_size_2_rank_0.pt", 10)
    caplog.clear()
    step = tmp_path / "checkpoints" / "global_step_3"
    again = step.rename(tmp_path / "global_step_3")
    message = refusal(
        resumed(*TWO_NODES, "trainer.resume_mode=resume_path", f"trainer.resume_from_path={again}", seen=())
    )
    assert "critic_1/optim_world_size_2_rank_0.pt is missing or corrupt" in message


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["trainer.n_gpus_per_node=2"], "has no model_world_size_4_rank_0.pt (it has extra_state_world_size_2"),
        (["+asyppo.num_critics=3"], "missing ['critic_2']"),
        (["+asyppo.num_critics=1"], "unexpected ['critic_1']"),
    ],
)
def test_on_several_nodes_another_number_of_gpus_or_critics_is_seen_in_what_is_here(resumed, overrides, said):
    assert said in refusal(resumed(*TWO_NODES, *overrides, seen=(0,)))


def test_a_node_may_have_one_of_the_critics_where_each_has_gpus_of_its_own(resumed, tmp_path):
    config = resumed(*TWO_NODES, "+asyppo.placement=split", "+asyppo.pool={n_gpus_per_node: 2, nnodes: 2}", seen=(0,))
    shutil.rmtree(tmp_path / "checkpoints/global_step_3/critic/critic_1")
    driver(config)


def test_a_checkpoint_that_would_be_loaded_without_weights_is_refused(resumed):
    message = refusal(resumed(TWO_RANKS, "critic.checkpoint.load_contents=[hf_model]"))
    assert "checkpoint.load_contents=['hf_model'] lacks 'model'" in message and "critic_0" in message
