"""Every misconfiguration is refused before Ray starts, with key, value and cure."""

import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer, Qwen3ForTokenClassification

from asyppo_verl.config import AsyPPOConfig
from asyppo_verl.critic_settings import critic_node
from asyppo_verl.preflight import prepare, read_config
from asyppo_verl.preflight.combinations import notices


def test_defaults_are_the_papers():
    config = AsyPPOConfig()
    assert (config.num_critics, config.adv_mask_fraction, config.entropy_filter_fraction) == (2, 0.2, 0.2)
    assert (config.critic_lam, config.shard, dict(config.critic_overrides)) == (1.0, "group", {})


REFUSED = [
    ("+asyppo.num_critics=5", ["rollout.n=4", "num_critics=5", "raise n or lower num_critics"]),
    ("+asyppo.num_critics=0", ["asyppo.num_critics=0", "at least 1"]),
    ("+asyppo.num_critics=two", ["asyppo.num_critics='two'", "whole number"]),
    ("+asyppo.num_critics=2.5", ["asyppo.num_critics=2.5", "whole number"]),
    ("+asyppo.num_critics=true", ["asyppo.num_critics=True", "whole number"]),
    ("+asyppo.adv_mask_fraction=1", ["asyppo.adv_mask_fraction=1", "[0, 1)"]),
    ("+asyppo.adv_mask_fraction=-0.1", ["asyppo.adv_mask_fraction=-0.1", "[0, 1)"]),
    ("+asyppo.entropy_filter_fraction=1.2", ["asyppo.entropy_filter_fraction=1.2", "[0, 1)"]),
    ("+asyppo.adv_mask_fraction=0.9", ["adv_mask_fraction=0.9", "entropy_filter_fraction=0.2", "more than 1"]),
    ("+asyppo.critic_lam=1.5", ["asyppo.critic_lam=1.5", "[0, 1]"]),
    ("+asyppo=3", ["asyppo=3", "+asyppo.num_critics=2"]),
    ("+asyppo.shard=row", ["asyppo.shard='row'", "'group'"]),
    ("+asyppo.num_critic=3", ["asyppo.num_critic=3", "did you mean num_critics?"]),
    ("+asyppo.mask_fraction=0.1", ["asyppo.mask_fraction=0.1", "did you mean adv_mask_fraction?"]),
    ("+asyppo.critic_overrides.7.optim.lr=1", ["critic 7", "num_critics=2"]),
    ("+asyppo.critic_overrides.1.optimm.lr=1", ["critic_overrides.1.optimm", "did you mean optim?"]),
    ("+asyppo.critic_overrides.1.optim.learning_rate=1", ["critic_overrides.1", "learning_rate"]),
    (
        "+asyppo.critic_overrides.1.fsdp.ulysses_sequence_parallel_size=2",
        ["ulysses_sequence_parallel_size", "critic 1"],
    ),
    ("+asyppo.critic_overrides.1=3", ["critic_overrides.1=3", "mapping"]),
    ("+asyppo.critic_overrides=[1]", ["critic_overrides=[1]", "map"]),
    ("trainer.use_v1=False", ["trainer.use_v1=False", "V1 trainer"]),
    ("trainer.v1.trainer_mode=synch", ["trainer.v1.trainer_mode='synch'", "did you mean sync?"]),
    ("critic.enable=False", ["critic.enable=False", "adv_estimator=grpo"]),
    ("critic.strategy=megatron", ["critic.strategy='megatron'", "fsdp2"]),
    ("distillation.enabled=True", ["distillation.enabled=True", "disable it"]),
    ("critic.model.lora_rank=8", ["critic.model.lora_rank=8", "lora_rank=0"]),
    ("actor_rollout_ref.actor.policy_loss.loss_mode=dro", ["loss_mode='dro'", "another loss_mode"]),
    ("critic.ppo_mini_batch_size=7 trainer.n_gpus_per_node=4", ["critic.ppo_mini_batch_size=7", "multiple of 8"]),
    (
        "critic.use_dynamic_bsz=False critic.ppo_micro_batch_size_per_gpu=3",
        ["critic.ppo_micro_batch_size_per_gpu=3", "multiple of 6"],
    ),
    (
        "critic.use_dynamic_bsz=False critic.ppo_micro_batch_size_per_gpu=4 critic.forward_micro_batch_size_per_gpu=5",
        ["critic.forward_micro_batch_size_per_gpu=5", "divisor of 32"],
    ),
    ("critic.fsdp.ulysses_sequence_parallel_size=2", ["ulysses_sequence_parallel_size=2", "does not divide"]),
    (
        "critic.fsdp.ulysses_sequence_parallel_size=2 trainer.n_gpus_per_node=2 critic.model.use_remove_padding=True",
        ["ulysses_sequence_parallel_size=2", "attn_implementation='sdpa'", "remove one of the two"],
    ),
    (
        "critic.fsdp.ulysses_sequence_parallel_size=2 trainer.n_gpus_per_node=2 "
        "critic.model.override_config.attn_implementation=flash_attention_2",
        ["ulysses_sequence_parallel_size=2", "use_remove_padding=True", "mini-critic 0"],
    ),
    ("critic.model.path=/nowhere/critic", ["critic.model.path=/nowhere/critic", "Hugging Face format"]),
    ("actor_rollout_ref.model.path=/nowhere/actor", ["actor_rollout_ref.model.path=/nowhere/actor", "Hugging Face"]),
]


@pytest.mark.parametrize(("overrides", "fragments"), REFUSED, ids=[overrides for overrides, _ in REFUSED])
def test_refused(compose, overrides, fragments):
    with pytest.raises(ValueError) as caught:
        prepare(compose(*overrides.split()))
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.fixture
def critic_copy(toy, tmp_path):
    """A changeable copy of the critic's folder."""
    return shutil.copytree(toy / "critic", tmp_path / "critic")


def edit(path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_critic_with_another_vocabulary_size_is_refused(compose, critic_copy):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (critic_copy / name).unlink()
    edit(critic_copy / "config.json", vocab_size=300)
    with pytest.raises(
        ValueError, match=r"critic.model.path=.* has vocab_size=300, actor_rollout_ref.model.path=.* has 259"
    ):
        prepare(compose(f"critic.model.path={critic_copy}"))


def test_a_critic_with_another_tokenizer_is_refused(compose, critic_copy):
    text = (critic_copy / "tokenizer.json").read_text()
    (critic_copy / "tokenizer.json").write_text(text.replace('"A": ', '"never seen": '))
    with pytest.raises(ValueError, match="tokenizers with different vocabularies"):
        prepare(compose(f"critic.model.path={critic_copy}"))


def test_a_critic_whose_embedding_is_only_padded_further_is_accepted(compose, critic_copy):
    edit(critic_copy / "config.json", vocab_size=320)
    prepare(compose(f"critic.model.path={critic_copy}"))


def test_an_override_is_checked_like_the_critic_it_replaces(compose, critic_copy):
    edit(critic_copy / "config.json", vocab_size=100)
    with pytest.raises(ValueError, match=r"asyppo.critic_overrides.1.model.path=.* has vocab_size=100"):
        prepare(compose(f"+asyppo.critic_overrides.1.model.path={critic_copy}"))


def test_a_vision_language_critic_is_refused(compose, critic_copy):
    from transformers import Qwen2_5_VLConfig

    Qwen2_5_VLConfig().save_pretrained(critic_copy)
    with pytest.raises(ValueError, match=r"vision-language model.*name a text model"):
        prepare(compose(f"critic.model.path={critic_copy}"))


@pytest.mark.parametrize("version", ["0.8.0", "0.9.2", "0.10.0"])
def test_other_verl_versions_are_refused(compose, monkeypatch, version):
    monkeypatch.setattr("importlib.metadata.version", lambda _package: version)
    with pytest.raises(ValueError, match=rf"verl=={version} is not supported.*verl==0.9.0, verl==0.9.1"):
        prepare(compose())


def test_prepare_points_verl_at_our_trainer(compose):
    config = compose()
    prepare(config)
    assert config.critic.enable is True
    assert config.trainer.v1.trainer_mode == "asyppo_sync"
    assert config.ray_kwargs.ray_init.runtime_env.env_vars.VERL_USE_EXTERNAL_MODULES == "asyppo_verl.plugin"
    prepare(config)
    assert config.trainer.v1.trainer_mode == "asyppo_sync"


def test_other_external_modules_of_the_user_stay(compose, monkeypatch):
    monkeypatch.setenv("VERL_USE_EXTERNAL_MODULES", "mine")
    config = compose()
    prepare(config)
    assert config.ray_kwargs.ray_init.runtime_env.env_vars.VERL_USE_EXTERNAL_MODULES == "mine,asyppo_verl.plugin"


def test_overrides_of_single_critics(compose, toy):
    config = compose(
        "+asyppo.critic_overrides.1.optim.lr=0.5",
        f"+asyppo.critic_overrides.1.model.path={toy}/actor",
        "+asyppo.critic_overrides.1.model.override_config.attn_implementation=eager",
    )
    asyppo = read_config(config)
    first, second = (critic_node(config, asyppo, index) for index in range(2))
    assert (first.optim.lr, second.optim.lr) == (1e-5, 0.5)
    assert second.model.path.endswith("/actor") and first.model.path.endswith("/critic")
    assert first.model.override_config.attn_implementation == "sdpa"
    assert second.model.override_config.attn_implementation == "eager"
    # verl's interpolations into other parts of the configuration still resolve.
    assert second.ppo_mini_batch_size == config.actor_rollout_ref.actor.ppo_mini_batch_size == 8


def test_an_idle_entropy_filter_is_said(compose):
    idle = [line for line in notices(compose(), AsyPPOConfig()) if "idle" in line]
    assert len(idle) == 1 and "entropy_coeff=0" in idle[0]
    assert not notices(compose("actor_rollout_ref.actor.entropy_coeff=0.1"), AsyPPOConfig())
    assert not notices(compose(), AsyPPOConfig(entropy_filter_fraction=0))


@pytest.mark.parametrize("loss_mode", ["kl_cov", "clip_cov", "geo_mean"])
def test_loss_modes_that_look_at_all_tokens_are_pointed_out(compose, loss_mode):
    config = compose(
        f"actor_rollout_ref.actor.policy_loss.loss_mode={loss_mode}", "actor_rollout_ref.actor.entropy_coeff=0.1"
    )
    assert any(loss_mode in line for line in notices(config, AsyPPOConfig()))


def test_critics_that_would_begin_equal_are_pointed_out(compose, toy, tmp_path, caplog):
    """One folder with a value head for both; with a folder each, or new heads, nothing is said."""
    torch.manual_seed(0)
    for name in ("first", "second"):
        Qwen3ForTokenClassification.from_pretrained(toy / "critic", num_labels=1).save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(toy / "critic").save_pretrained(tmp_path / name)
    own = f"+asyppo.critic_overrides.1.model.path={tmp_path}/second"
    prepare(compose())
    prepare(compose(f"critic.model.path={tmp_path}/first", own))
    assert "begin equal" not in caplog.text
    prepare(compose(f"critic.model.path={tmp_path}/first"))
    assert f"2 mini-critics start from {tmp_path}/first with its value head" in caplog.text
