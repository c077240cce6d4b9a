"""What the checks before Ray let through, what they only say, and that they know verl as it is."""

import copy
import inspect
import logging
import re
import shutil

import pytest
import torch
from good_settings import ESTIMATORS, LEGAL
from omegaconf import OmegaConf
from test_bad_input import complete, critic_copy, data, driver, edit, refusal  # noqa: F401
from transformers import AutoTokenizer, Qwen3ForSequenceClassification, Qwen3ForTokenClassification

from asyppo_verl.config import SUPPORTED_VERL
from asyppo_verl.preflight import prepare
from asyppo_verl.preflight.support import LOSS_AGG_MODES
from asyppo_verl.preflight.values import default_config

OWN_MODULES = "+ray_kwargs.ray_init.runtime_env.env_vars.VERL_USE_EXTERNAL_MODULES=mine"


@pytest.mark.parametrize("overrides", LEGAL)
def test_legal_settings_are_let_through(complete, toy, overrides):  # noqa: F811
    driver(complete(*overrides.replace("TOY", str(toy)).split()))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_run_with_another_estimator_is_left_alone(compose, caplog, estimator):
    """A shared yaml may hold the asyppo node, wrong or not, while a baseline is run."""
    config = compose(
        f"algorithm.adv_estimator={estimator}",
        "algorithm.use_pf_ppo=True",
        "+asyppo.num_critics=-3",
        "+num_critics=2",
        "ray_kwargs.ray_init.num_cpus=1",
        "critic.cliprange_value=no",
        "trainer.resume_mode=disable",
    )
    before = copy.deepcopy(config)
    with caplog.at_level(logging.DEBUG):
        driver(config)
    assert config == before and "asyppo" not in caplog.text


def test_names_that_only_workers_know_are_left_to_them(compose):
    driver(compose("algorithm.adv_estimator=AsyPPO", "critic.enable=True", OWN_MODULES))
    prepare(compose("actor_rollout_ref.actor.policy_loss.loss_mode=mine", OWN_MODULES))


# -- verl as it is -------------------------------------------------------------------------------------------------


def test_the_defaults_that_types_are_compared_with_are_verls():
    from hydra import compose, initialize_config_module

    with initialize_config_module("verl.trainer.config", version_base=None):
        composed = OmegaConf.to_container(compose("ppo_trainer"), resolve=True)
    assert {**default_config(), "model_engine": "dp"} == composed


def test_the_loss_aggregations_are_verls():
    from verl.trainer.ppo.core_algos import agg_loss

    loss = torch.ones(1, 1)
    for mode in LOSS_AGG_MODES:
        agg_loss(loss, loss, mode, loss_scale_factor=1)
    with pytest.raises(ValueError):
        agg_loss(loss, loss, "mean")
    assert set(re.findall(r'"((?:token|seq)-[\w-]+)"', inspect.getsource(agg_loss))) == set(LOSS_AGG_MODES)


def test_verls_gae_reads_no_other_setting():
    """What could change rows or their meaning on the way to the advantages has a row in docs/options.md."""
    from tensordict import TensorDict
    from verl.protocol import DataProto
    from verl.trainer.ppo.ray_trainer import compute_advantage
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    read: set[str] = set()

    class Algorithm(dict):
        def get(self, key, default=None):
            read.add(key)
            return default

    rows = {"token_level_rewards": torch.rand(2, 3), "values": torch.rand(2, 3), "response_mask": torch.ones(2, 3)}

    def advantages(std: bool):
        batch = TensorDict({key: row.clone() for key, row in rows.items()}, batch_size=2)
        found = compute_advantage(DataProto(batch=batch), "gae", norm_adv_by_std_in_grpo=std, config=Algorithm())
        return found.batch["advantages"]

    assert torch.equal(advantages(True), advantages(False)) and read == {"use_pf_ppo"}
    source = inspect.getsource(PPOTrainer._compute_advantage)
    assert set(re.findall(r"config\.algorithm\.(?:get\(\")?(\w+)", source)) == {
        "use_kl_in_reward", "kl_penalty", "rollout_correction", "adv_estimator", "gamma", "lam", "norm_adv_by_std_in_grpo"
    }  # fmt: skip


@pytest.mark.parametrize("version", ["0.8.0", "0.9.2", "0.9.2.dev0", "0.10.0", "0.9.1.1", "main"])
def test_other_verl_versions_are_refused(compose, monkeypatch, version):
    monkeypatch.setattr("asyppo_verl.config.verl_version", lambda: version)
    monkeypatch.setattr("asyppo_verl.preflight.support.verl_version", lambda: version)
    with pytest.raises(ValueError, match=rf"verl=={version} is not supported.*verl==0.9.0, verl==0.9.1"):
        prepare(compose())


@pytest.mark.parametrize("version", ["0.9.1.post1", "0.9.1.dev3", "0.9.1rc1", "0.9.1+cu129", "0.9.0.post2+local"])
def test_builds_of_a_supported_verl_are_pointed_out(compose, monkeypatch, caplog, version):
    monkeypatch.setattr("asyppo_verl.config.verl_version", lambda: version)
    monkeypatch.setattr("asyppo_verl.preflight.support.verl_version", lambda: version)
    prepare(compose())
    assert f"verl=={version} is a build that asyppo_verl was not tested with" in caplog.text


def test_the_installed_verl_is_supported_without_a_word(compose, caplog):
    prepare(compose())
    assert "not tested with" not in caplog.text and SUPPORTED_VERL == ("0.9.0", "0.9.1")


# -- what is only said ---------------------------------------------------------------------------------------------


@pytest.fixture
def said(complete, caplog):  # noqa: F811
    """What the driver says of a configuration that it accepts."""

    def run(*overrides: str) -> str:
        caplog.clear()
        driver(complete(*overrides))
        return caplog.text

    return run


def test_saving_in_the_background_is_set_right_where_nothing_does_it(complete, caplog):  # noqa: F811
    """verl would note no checkpoint as complete, and a killed run begin anew."""
    key = "actor_rollout_ref.actor.checkpoint"
    config = complete(f"{key}.async_save=True")
    driver(config)
    assert f"{key}.async_save=True: only Megatron" in caplog.text
    assert config.actor_rollout_ref.actor.checkpoint.async_save is False
    with pytest.raises(ValueError, match=r"actor.checkpoint=None.*remove the override"):
        driver(complete(f"{key}=null"))


def test_settings_that_verl_does_not_read_are_said(said):
    assert "critic.grad_clip=0.5 is not read by verl; set critic.optim.clip_grad" in said("critic.grad_clip=0.5")
    assert "is not read by verl" not in said("critic.grad_clip=0.5", "critic.optim.clip_grad=0.5")
    assert "set critic.fsdp.ulysses_sequence_parallel_size" in said("critic.ulysses_sequence_parallel_size=2")
    assert "custom_reward_function.path is not read by verl any more" in said("custom_reward_function.path=my.py")
    assert "reward_model.model is not read by verl any more" in said("reward_model.model.path=my")
    bypass = ["algorithm.rollout_correction.bypass_mode=True", "algorithm.rollout_correction.rollout_rs=seq_mean_k1"]
    assert "rollout_correction.rollout_rs=seq_mean_k1 is not read by verl with bypass_mode=True" in said(*bypass)
    loss = "actor_rollout_ref.actor.policy_loss"
    assert "rollout_correction.rollout_rs=seq_mean_k1 is not read" in said(*bypass, f"{loss}.loss_mode=bypass_mode")
    assert "not read" not in said(*bypass[1:]) + said(
        *bypass, f"+{loss}.rollout_correction.rollout_rs=seq_mean_k1", f"{loss}.loss_mode=bypass_mode"
    )
    assert "is not read" in said(*bypass, f"+{loss}.rollout_correction.rollout_rs=seq_mean_k1")
    assert "not read" not in said("reward_model=null")


def test_one_critic_with_a_lambda_of_its_own_is_said_to_be_no_ppo(said):
    one = "+asyppo.num_critics=1"
    assert "for that set +asyppo.critic_lam=0.9" in said(one, "algorithm.lam=0.9")
    assert "not verl's PPO" not in said(one) + said(one, "algorithm.lam=0.9", "+asyppo.critic_lam=0.9")


def test_an_idle_entropy_filter_is_said(said):
    assert said().count("entropy_coeff=0 gives no entropy bonus") == 1
    assert "entropy" not in said("actor_rollout_ref.actor.entropy_coeff=0.1")
    assert "entropy" not in said("+asyppo.entropy_filter_fraction=0")


@pytest.mark.parametrize("loss_mode", ["kl_cov", "clip_cov", "geo_mean"])
def test_loss_modes_that_look_at_all_tokens_are_pointed_out(said, loss_mode):
    assert f"loss_mode='{loss_mode}' looks at all" in said(f"actor_rollout_ref.actor.policy_loss.loss_mode={loss_mode}")


@pytest.mark.parametrize("kind", [Qwen3ForTokenClassification, Qwen3ForSequenceClassification])
def test_critics_that_would_begin_equal_are_pointed_out(said, toy, tmp_path, kind):
    """One folder with a value head for both, or of a reward model; with a folder each, or new heads, nothing is said."""
    torch.manual_seed(0)
    for name in ("first", "second"):
        kind.from_pretrained(toy / "critic", num_labels=1).save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(toy / "critic").save_pretrained(tmp_path / name)
    own = f"+asyppo.critic_overrides.1.model.path={tmp_path}/second"
    assert "begin equal" not in said() + said(f"critic.model.path={tmp_path}/first", own)
    assert f"2 mini-critics start from {tmp_path}/first with its value head" in said(
        f"critic.model.path={tmp_path}/first"
    )


def test_the_last_step_of_the_data_is_the_last(complete):  # noqa: F811
    """verl saves and validates at ``total_training_steps`` only; the learning rate schedule stays the one that was asked for."""
    from verl.trainer.ppo.v1 import get_trainer_cls

    def trainer(*overrides: str):
        cls = get_trainer_cls("asyppo_sync")
        made = cls.__new__(cls)
        made.config = complete("trainer.total_training_steps=5", "data.train_max_samples=50", *overrides)
        made.trainer_mode, made.parameter_sync_step = "sync", 1
        made._init_tokenizer()
        made._init_dataloader()
        return made

    made = trainer("trainer.total_epochs=1")
    assert (made.total_training_steps, made.config.critic.optim.total_training_steps) == (3, 5)
    assert trainer("trainer.total_epochs=2").total_training_steps == 5


def test_settings_that_nothing_reads_are_pointed_out(said):
    assert "asypo={'num_critics': 3} is not read by AsyPPO" in said("+asypo.num_critics=3")
    assert "resume_from_path=/nowhere/global_step_3 is ignored" in said(
        "trainer.resume_from_path=/nowhere/global_step_3"
    )


def test_a_megatron_actor_is_pointed_out(said):
    """AsyPPO needs nothing of the actor's engine beyond verl's loss function, but nobody has run it."""
    engine = ["actor@actor_rollout_ref.actor=megatron_actor", "ref@actor_rollout_ref.ref=megatron_ref"]
    message = said(*engine, "actor_rollout_ref.actor.strategy=megatron", "actor_rollout_ref.actor.use_dynamic_bsz=True")
    assert "actor_rollout_ref.actor.strategy=megatron: AsyPPO has been tested with actors on fsdp" in message


# -- models --------------------------------------------------------------------------------------------------------


def test_a_critic_whose_embedding_is_only_padded_further_is_accepted(said, critic_copy):  # noqa: F811
    edit(critic_copy / "config.json", vocab_size=320)
    assert "vocab_size" not in said(f"critic.model.path={critic_copy}")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (critic_copy / name).unlink()
    assert "vocab_size=320 and 259, and no tokenizers" in said(f"critic.model.path={critic_copy}")


def test_tokens_that_only_one_of_the_tokenizers_has(said, toy, critic_copy, tmp_path):  # noqa: F811
    """Added to the actor's: the critic's model must have a row for them. Added to the critic's: nobody meets them."""
    tokenizer = AutoTokenizer.from_pretrained(toy / "actor")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    actor = shutil.copytree(toy / "actor", tmp_path / "actor")
    for folder in (actor, critic_copy):
        tokenizer.save_pretrained(folder)
        edit(folder / "config.json", vocab_size=320)
    wide = shutil.copytree(toy / "critic", tmp_path / "wide")
    edit(wide / "config.json", vocab_size=320)
    message = said(f"actor_rollout_ref.model.path={actor}", f"critic.model.path={wide}")
    assert "1 tokens of the actor, such as '<tool>', are not in the critic's tokenizer" in message
    assert "tokenizer" not in said(f"critic.model.path={critic_copy}")
    with pytest.raises(ValueError, match="vocab_size=259 and 320, so the critic has no row"):
        said(f"actor_rollout_ref.model.path={actor}")


def test_vision_language_actors(complete, toy, tmp_path, caplog, monkeypatch):  # noqa: F811
    """Refused where verl counts positions along several axes; with others the critics see the text only."""
    from transformers import Qwen2_5_VLConfig
    from verl.workers.config import model

    text = Qwen2_5_VLConfig().text_config.to_dict() | {"vocab_size": 259}
    actor = shutil.copytree(toy / "actor", tmp_path / "actor")
    Qwen2_5_VLConfig(text_config=text, architectures=["Qwen2_5_VLForConditionalGeneration"]).save_pretrained(actor)

    class Processor:
        chat_template = "{{ messages }}"

    monkeypatch.setattr(model, "hf_processor", lambda *_args, **_more: Processor())
    driver(complete(f"actor_rollout_ref.model.path={actor}"))
    assert "the critics will see the text only, no images" in caplog.text
    monkeypatch.setattr(Processor, "get_rope_index", print, raising=False)
    again = actor.rename(tmp_path / "again")
    message = refusal(complete(f"actor_rollout_ref.model.path={again}"))
    assert f"actor_rollout_ref.model.path={again} is a vision-language model whose tokens have positions" in message
