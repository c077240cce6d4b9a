"""AsyPPO's options, what a run is told before Ray, and the settings of single critics."""

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from test_bad_input import complete, data  # noqa: F401
from verl.workers.config.optimizer import build_optimizer

from asyppo_verl.critic_settings import critic_nodes, read_config
from asyppo_verl.critic_worker import worker_config
from asyppo_verl.preflight import prepare


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


def test_modules_that_a_ray_job_names_are_left_to_it(compose, monkeypatch):
    """Ray refuses a driver that sets a variable of its job, even to the same value."""
    for modules in ("mine,asyppo_verl.plugin", "mine"):
        job = {"runtime_env": {"env_vars": {"VERL_USE_EXTERNAL_MODULES": modules}}}
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
        monkeypatch.setenv("VERL_USE_EXTERNAL_MODULES", modules)
        if modules == "mine":
            with pytest.raises(ValueError, match="VERL_USE_EXTERNAL_MODULES=mine; add asyppo_verl"):
                prepare(compose())
        else:
            prepare(config := compose())
            assert OmegaConf.select(config, "ray_kwargs.ray_init.runtime_env.env_vars") is None


def test_overrides_of_single_critics(compose, toy):
    config = compose(
        "+asyppo.critic_overrides.1.optim.lr=0.5",
        f"+asyppo.critic_overrides.1.model.path={toy}/actor",
        "+asyppo.critic_overrides.1.model.override_config.attn_implementation=eager",
    )
    first, second = critic_nodes(config, read_config(config))
    assert (first.optim.lr, second.optim.lr) == (1e-5, 0.5)
    assert second.model.path.endswith("/actor") and first.model.path.endswith("/critic")
    assert first.model.override_config.attn_implementation == "sdpa"
    assert second.model.override_config.attn_implementation == "eager"
    # verl's interpolations into other parts of the configuration still resolve.
    assert second.ppo_mini_batch_size == config.actor_rollout_ref.actor.ppo_mini_batch_size == 8


def test_a_critics_own_value_is_not_silenced_by_another_name_set_for_all(compose, toy):
    for_all = {"optim.grad_clip": 2, "optim.warmup_style": "constant", "optim.lr_warmup_steps": 7}
    for_all |= {"optim.override_optimizer_config": "{lr: 0.1, weight_decay: 0.2, betas: [0.3, 0.4], eps: 0.5}"}
    for_all |= {"model.hf_config_path": toy / "actor"}
    for_all |= {"ppo_infer_max_token_len_per_gpu": 5000, "ppo_infer_micro_batch_size_per_gpu": 4}
    names = {"optim.clip_grad": 0.25, "optim.lr_scheduler_type": "cosine", "optim.lr_warmup_steps_ratio": 0.5}
    names |= {"optim.lr": 0.6, "optim.weight_decay": 0.7, "optim.betas": "[0.8, 0.9]", "model.path": toy / "critic"}
    names |= {"forward_max_token_len_per_gpu": 4000, "forward_micro_batch_size_per_gpu": 2}
    config = compose(
        *(f"++critic.{name}={value}" for name, value in for_all.items()),
        *(f"+asyppo.critic_overrides.{index}.{name}={value}" for index in (1, 2) for name, value in names.items()),
        "+asyppo.critic_overrides.2.optim.grad_clip=3",
        "+asyppo.num_critics=3",
    )
    found = []
    for node in critic_nodes(config, read_config(config)):
        worker = worker_config(node)
        optim, engine = worker.optimizer_config, worker.engine_config
        (adam,) = build_optimizer([torch.nn.Parameter(torch.ones(1))], optim).param_groups
        batching = engine.infer_max_token_len_per_gpu, engine.infer_micro_batch_size_per_gpu
        of_adam = adam["lr"], adam["weight_decay"], *adam["betas"], adam["eps"]
        model = Path(worker.model_config.hf_config_path).name
        found.append((optim.clip_grad, optim.lr_scheduler_type, optim.lr_warmup_steps, *batching, model, *of_adam))
    assert found[0] == (2, "constant", 7, 5000, 4, "actor", 0.1, 0.2, 0.3, 0.4, 0.5)
    assert found[1] == (0.25, "cosine", -1, 4000, 2, "critic", 0.6, 0.7, 0.8, 0.9, 0.5)
    assert found[2] == (3, *found[1][1:])


def test_one_critic_may_have_any_setting_that_verl_knows(compose):
    """Also one that verl's files leave out, and any key of what verl hands on unread, whatever is set for all."""
    own = {"fsdp.mixed_precision": "{reduce_dtype: bf16}", "optim.grad_clip": 3}
    own |= {"optim.override_optimizer_config": "{fused: true}", "model.override_config": "{rope_theta: 7}"}
    own["fsdp.wrap_policy"] = "{transformer_layer_cls_to_wrap: [Layer]}"
    config = compose(
        "~critic.fsdp.mixed_precision",
        "critic.optim.override_optimizer_config={eps: 0.5}",
        *(f"+asyppo.critic_overrides.1.{name}={value}" for name, value in own.items()),
    )
    _, second = critic_nodes(config, read_config(config))
    assert second.optim.override_optimizer_config == {"eps": 0.5, "fused": True}
    assert second.model.override_config.rope_theta == 7
    assert second.fsdp.mixed_precision == {"reduce_dtype": "bf16"} and second.optim.grad_clip == 3
    assert second.fsdp.wrap_policy == {"transformer_layer_cls_to_wrap": ["Layer"]}


def test_what_verl_derives_from_a_critics_own_setting_is_that_critics_when_verl_has_resolved_its_configuration(
    complete,  # noqa: F811
):
    """verl's main resolves all interpolations before it builds the trainer."""
    own = {0: "{optim: {lr: 1}}", 1: "{use_dynamic_bsz: false, ppo_micro_batch_size_per_gpu: 4}"}
    own |= {2: "{ppo_max_token_len_per_gpu: 5000}", 3: "{ppo_max_token_len_per_gpu: 6000}"}
    config = complete(
        "+asyppo.num_critics=4",
        "critic.use_dynamic_bsz=True",
        "critic.ppo_max_token_len_per_gpu=4000",
        "critic.optim.min_lr_ratio=${critic.optim.lr}",
        *(f"+asyppo.critic_overrides.{index}={settings}" for index, settings in own.items()),
        "+asyppo.critic_overrides.3.forward_max_token_len_per_gpu=7000",
    )
    expected = [OmegaConf.to_container(node, resolve=True) for node in critic_nodes(config, read_config(config))]
    prepare(config)
    OmegaConf.resolve(config)
    found = critic_nodes(config, read_config(config))
    assert [{**OmegaConf.to_container(node), "enable": None} for node in found] == expected
    assert [node.forward_max_token_len_per_gpu for node in found] == [4000, 4000, 5000, 7000]
    assert [node.forward_micro_batch_size_per_gpu for node in found] == [None, 4, None, None]
    assert [node.optim.min_lr_ratio for node in found] == [1, 1e-5, 1e-5, 1e-5]


def test_what_is_set_for_all_under_another_name_stays_when_verl_has_resolved_its_configuration(complete):  # noqa: F811
    config = complete(
        "++critic.ppo_infer_max_token_len_per_gpu=3000", "+asyppo.critic_overrides.1.ppo_max_token_len_per_gpu=5000"
    )
    prepare(config)
    OmegaConf.resolve(config)
    _, second = critic_nodes(config, read_config(config))
    assert worker_config(second).engine_config.infer_max_token_len_per_gpu == 3000


def test_a_slash_at_the_end_of_the_resumed_path_is_removed(compose, tmp_path, monkeypatch):
    """verl reads the step with int() from what follows "global_step_"."""
    monkeypatch.setattr("asyppo_verl.preflight.CHECKS", ())
    (tmp_path / "global_step_3").mkdir()
    config = compose("trainer.resume_mode=resume_path", f"trainer.resume_from_path={tmp_path}/global_step_3/")
    prepare(config)
    assert config.trainer.resume_from_path == f"{tmp_path}/global_step_3"
