"""What makes a critic faster leaves its values and gradients what they are: in bf16, packed, through verl's engine."""

import functools
import sys

import pytest
import ray
import torch
from tensordict import TensorDict
from test_critics import ProbedWorker, batch, cluster, start, train  # noqa: F401 (a fixture)
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, register
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import TrainingWorkerConfig
from verl.workers.engine_workers import TrainingWorker

from asyppo_verl import value_model
from asyppo_verl.critic_worker import value_field

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

EXACT, ROUNDED = 0.0, 0.02
SETTINGS = {
    # a setting of critic.*: how far values and gradients may be from those without it, relative to the largest
    "model.use_remove_padding=False": ROUNDED,
    "model.enable_gradient_checkpointing=False": EXACT,
    "fsdp.reshard_after_forward=False": EXACT,
    "optim.override_optimizer_config={fused: true}": EXACT,
    "ppo_max_token_len_per_gpu=200": ROUNDED,
    "model.override_config.attn_implementation=eager": ROUNDED,
    "model.override_config.attn_implementation=torch_packed": ROUNDED,
    "fsdp.seed=1": ROUNDED,  # which changes nothing: this critic's layers are compiled
}
COMPILED = len(SETTINGS)
AS_ON_GPUS = [
    "critic.fsdp.mixed_precision.param_dtype=bf16",
    "critic.model.use_remove_padding=True",
    "critic.model.enable_gradient_checkpointing=True",
    "critic.ppo_max_token_len_per_gpu=24",
    "critic.forward_max_token_len_per_gpu=24",
]


class AlikeWorker(ProbedWorker):
    """Critics that differ in their settings only."""

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def make_alike(self) -> None:
        first, *others = (critic.engine.module for critic in self.critics.values())
        with torch.no_grad():
            for other in others:
                for parameter, same in zip(other.parameters(), first.parameters(), strict=True):
                    parameter.copy_(same)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def compile(self, index: int) -> None:
        """Let a critic's layers be compiled, by all but the last stage of the compiler, which takes a minute on a CPU."""
        from torch._dynamo import config  # here, since cloudpickle cannot take this module along

        config.disable = False
        compile_with, torch.compile = torch.compile, functools.partial(torch.compile, backend="aot_eager")
        value_model.compile_layers(self.critics[index].engine.module)
        torch.compile = compile_with

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def graphs(self) -> int:
        from torch._dynamo.utils import counters

        return counters["stats"]["unique_graphs"]

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def gradients(self) -> list[torch.Tensor]:
        """The gradient of every critic's first step: AdamW's first moments are a tenth of it."""
        return [
            torch.cat([state["exp_avg"].full_tensor().flatten() for state in critic.engine.optimizer.state.values()])
            for critic in self.critics.values()
        ]


@pytest.fixture(scope="module")
def found(cluster, toy):  # noqa: F811
    """Values before and after a step, loss and gradient of a critic with each of the settings, and of one without (the first)."""
    from conftest import composing, overrides_for

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    own = [f"+asyppo.critic_overrides.{index}.{setting}" for index, setting in enumerate(SETTINGS, start=1)]
    count = len(SETTINGS) + 1
    compose = composing(overrides_for(toy))
    group = start(compose, 1, f"+asyppo.num_critics={count}", *AS_ON_GPUS, *own, worker=AlikeWorker)
    group.make_alike()
    group.compile(COMPILED)
    data = batch(20, num_critics=count)
    for index in range(1, count):
        data[value_field(index)] = data[value_field(0)]
    values = group.infer_batch(data.copy()).get()
    losses = [train(group, index, data)["critic/vf_loss"][0] for index in range(count)]
    (gradients,), (graphs,) = group.gradients(), group.graphs()
    after = group.infer_batch(data.copy()).get()
    assert graphs == 2, (
        "for all layers and lengths one to train, also where a checkpoint is recomputed, and one to evaluate"
    )
    ray.kill(group.workers[0])
    of_critics = ([found[value_field(index)].values() for index in range(count)] for found in (values, after))
    return list(zip(*of_critics, losses, gradients, strict=True))


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_faster_critic_is_the_same_critic(found, setting):
    expected, actual = found[0], found[1 + list(SETTINGS).index(setting)]
    assert expected[3].abs().max() > 0 and not torch.equal(expected[0], expected[1])
    for without, with_it in zip(expected, actual, strict=True):
        without, with_it = torch.as_tensor(without), torch.as_tensor(with_it)
        error = (without - with_it).abs().max() / without.abs().max()
        assert error <= SETTINGS[setting], f"{error:.4f}"


class ActorsWorker(Worker):
    """verl's actors, one for each configuration."""

    configs: tuple = ()

    def __init__(self, config: object = None) -> None:
        super().__init__()
        self.actors = [TrainingWorker(config) for config in self.configs]
        for actor in self.actors:
            actor.reset()
            actor.set_loss_fn(_mean_log_prob)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def log_probs_and_norms(self, data: TensorDict) -> list[tuple[torch.Tensor, float]]:
        found = []
        for actor in self.actors:
            log_probs = actor.infer_batch(data.copy())["log_probs"].values()
            step = data.copy()
            tu.assign_non_tensor(step, global_batch_size=len(data), compute_loss=True)
            found.append((log_probs, tu.get(actor.train_batch(step), "metrics")["grad_norm"]))
        return found


def _mean_log_prob(model_output: dict, data: TensorDict, dp_group: object = None) -> tuple[torch.Tensor, dict]:
    return -model_output["log_probs"].values().sum() / tu.get(data, "batch_num_tokens"), {}


def test_the_actor_needs_no_flash_attn(cluster, toy):  # noqa: F811
    """verl's actor on packed rows with torch's own attention, beside padded rows: log probabilities and gradient."""
    from conftest import composing, overrides_for

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    compose, configs = composing(overrides_for(toy)), []
    for packed, attention in ((False, "sdpa"), (True, "sdpa"), (True, "torch_packed")):
        model = "actor_rollout_ref.model"
        config = compose(
            f"{model}.use_remove_padding={packed}",
            f"+{model}.override_config.attn_implementation={attention}",
            "+actor_rollout_ref.actor.fsdp_config.mixed_precision={param_dtype: bf16}",
            "actor_rollout_ref.actor.fsdp_config.strategy=fsdp2",
        ).actor_rollout_ref
        engine, optimizer = (omega_conf_to_dataclass(node) for node in (config.actor.fsdp_config, config.actor.optim))
        engine.use_dynamic_bsz, engine.max_token_len_per_gpu, engine.infer_max_token_len_per_gpu = True, 24, 24
        configs.append(
            TrainingWorkerConfig(
                model_type="language_model",
                model_config=omega_conf_to_dataclass(config.model),
                engine_config=engine,
                optimizer_config=optimizer,
            )
        )
    group = RayWorkerGroup(
        resource_pool=RayResourcePool([1], use_gpu=True, max_colocate_count=1),
        ray_cls_with_init=RayClassWithInitArgs(
            cls=ray.remote(type("Actors", (ActorsWorker,), {"configs": tuple(configs)}))
        ),
        device_name="cpu",
    )
    ((expected, norm), *others) = group.log_probs_and_norms(batch(20))[0]
    ray.kill(group.workers[0])
    assert norm > 0
    for log_probs, other in others:
        torch.testing.assert_close(log_probs, expected, rtol=0, atol=0.02 * expected.abs().max().item())
        assert other == pytest.approx(norm, rel=0.02)
