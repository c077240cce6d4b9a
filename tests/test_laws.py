"""Laws 5 and 6 on verl's real workers: the gradients that FSDP engines compute, on one, two and four ranks.

Law 5: a masked token gets exactly no policy gradient, a filtered one exactly no entropy gradient, the others what they had.
Law 6: a critic's gradient is that of the loss written down by hand, however rows are cut, padded, packed and dealt out.
"""

from functools import partial

import clusters
import pytest
import ray
import torch
from conftest import composing, overrides_for
from tensordict import TensorDict
from test_critics import ProbedWorker, batch, start, train
from verl.single_controller.base.decorator import Dispatch, register
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.engine_workers import ActorRolloutRefWorker
from verl.workers.utils.padding import response_from_nested

from asyppo_verl.actor_loss import asyppo_actor_loss
from asyppo_verl.asyppo import mask_advantage
from asyppo_verl.batch_io import KEEP_ENTROPY
from asyppo_verl.critic_worker import value_field

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

ROW = "row"
"""Field with the number of a row, by which it is found again after micro-batching."""


@pytest.fixture(scope="module")
def cluster():
    with clusters.started("test_critics", __name__):
        yield


# -- law 6 ---------------------------------------------------------------------------------------------------------


class WatchedCritics(ProbedWorker):
    """The mini-critics, with the gradients of their last optimizer step kept."""

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def keep_gradients(self) -> None:
        for critic in self.critics.values():
            _keep_gradients(critic.engine)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def gradients(self, index: int) -> dict[str, torch.Tensor]:
        return self.critics[index].engine.kept


def _keep_gradients(engine) -> None:
    step = engine.optimizer_step

    def noted():
        engine.kept = {
            name: (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad).detach().clone()
            for name, p in engine.module.named_parameters()
        }
        return step()

    engine.optimizer_step = noted


BATCHING = {
    "one micro-batch": {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 5},
    "single rows": {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 1},
    "dynamic": {"use_dynamic_bsz": True, "max_token_len_per_gpu": 24},
}


def by_hand(
    toy, weights: dict[str, torch.Tensor], data: TensorDict, index: int, clip: float
) -> dict[str, torch.Tensor]:
    """Gradient of verl's clipped value loss, row by row with plain transformers.

    ``0.5 * sum max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / response tokens``
    """
    from transformers import AutoModelForTokenClassification

    model = AutoModelForTokenClassification.from_pretrained(toy / "critic", num_labels=1, dtype=torch.float32)
    model.load_state_dict(weights)
    total = torch.zeros(())
    fields = ("input_ids", "prompts", "responses", "response_mask", "returns", value_field(index))
    for ids, prompt, response, mask, target, old in zip(*(data[field].unbind() for field in fields), strict=True):
        values = model(ids[None]).logits[0, len(prompt) - 1 : len(prompt) + len(response) - 1, 0]
        clipped = values.clamp(old - clip, old + clip)
        total = total + (torch.maximum((values - target) ** 2, (clipped - target) ** 2) * mask).sum()
    (0.5 * total / data["response_mask"].values().sum()).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_law_6_critic_gradients_are_those_of_the_loss_by_hand(cluster, toy, ranks):
    """On any number of ranks, in any micro-batches, padded or packed; rows without response tokens among them."""
    packed = "critic.model.use_remove_padding=True"
    group = start(composing(overrides_for(toy)), ranks, packed, worker=WatchedCritics)
    group.keep_gradients()
    data, index = batch(20), 1
    data[value_field(index)] = data[value_field(index)] * 20  # old values of up to 2: clipping has work to do
    weights = group.weights()[0][index]
    expected, unclipped = (by_hand(toy, weights, data, index, clip) for clip in (0.5, 1e9))
    assert not all(map(torch.equal, expected.values(), unclipped.values()))
    for remove_padding in (True, False):
        for name, engine in BATCHING.items():
            group.reset()
            group.keep_gradients()
            group.set_batching(**engine)
            train(group, index, data, use_remove_padding=remove_padding)
            for found in group.gradients(index):
                assert found.keys() == expected.keys()
                for parameter, gradient in expected.items():
                    assert gradient.any(), parameter
                    # Sums of float32 in another order: a few units in the last place of the largest entry.
                    within = {"rtol": 1e-4, "atol": 1e-5 * float(gradient.abs().max())}
                    torch.testing.assert_close(
                        found[parameter], gradient, **within, msg=lambda m, n=name, p=parameter: f"{n}, {p}: {m}"
                    )
    for worker in group.workers:
        ray.kill(worker)


# -- law 5 ---------------------------------------------------------------------------------------------------------


class Watched:
    """The actor's loss; keeps the gradient of every token's log-probability and entropy."""

    def __init__(self, config) -> None:
        self.config = config
        self.kept: dict[str, dict[int, torch.Tensor]] = {"log_probs": {}, "entropy": {}}

    def __call__(self, model_output, data, dp_group=None):
        for name in self.kept:
            values, offsets = model_output[name].values(), model_output[name].offsets()
            values.register_hook(partial(self.keep, name, data[ROW].tolist(), offsets.diff().tolist()))
            model_output = {**model_output, name: torch.nested.nested_tensor_from_jagged(values, offsets)}
        return asyppo_actor_loss(self.config, model_output, data, dp_group)

    def keep(self, name: str, rows: list[int], widths: list[int], grad: torch.Tensor) -> None:
        self.kept[name].update(zip(rows, (part.clone() for part in grad.split(widths)), strict=True))


class WatchedActor(ActorRolloutRefWorker):
    """verl's actor with a window to its loss."""

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def watch(self) -> None:
        self.watched = Watched(omega_conf_to_dataclass(self.config.actor))
        self.actor.set_loss_fn(self.watched)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def token_gradients(self) -> dict[str, dict[int, torch.Tensor]]:
        kept = self.watched.kept
        self.watched.kept = {name: {} for name in kept}
        return kept

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def set_batching(self, **engine: object) -> None:
        for key, value in engine.items():
            setattr(self.actor.engine_config, key, value)


def start_actor(toy, ranks: int) -> RayWorkerGroup:
    config = composing(overrides_for(toy))(
        f"trainer.n_gpus_per_node={ranks}",
        "actor_rollout_ref.actor.entropy_coeff=0.01",
        "actor_rollout_ref.actor.optim.lr=0",  # so that every update starts from the same weights
        "actor_rollout_ref.actor.use_torch_compile=False",
        "actor_rollout_ref.actor.fsdp_config.use_torch_compile=False",
        "+actor_rollout_ref.actor.fsdp_config.mixed_precision={param_dtype: fp32, reduce_dtype: fp32, buffer_dtype: fp32}",
        "actor_rollout_ref.model.enable_gradient_checkpointing=False",
        "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
    )
    group = RayWorkerGroup(
        resource_pool=RayResourcePool([ranks], use_gpu=True, max_colocate_count=3),
        ray_cls_with_init=RayClassWithInitArgs(
            cls=ray.remote(WatchedActor), config=config.actor_rollout_ref, role="actor"
        ),
        device_name="cpu",
    )
    group.init_model()
    group.watch()
    return group


def update(group: RayWorkerGroup, data: TensorDict, *, remove_padding: bool) -> dict[str, dict[int, torch.Tensor]]:
    """One optimizer step on the whole batch; the gradients by row, of all ranks."""
    call = data.copy()
    tu.assign_non_tensor(
        call,
        calculate_entropy=True,
        global_batch_size=len(data),
        mini_batch_size=len(data),
        epochs=1,
        seed=1,
        dataloader_kwargs={"shuffle": False},
        temperature=1.0,
        use_remove_padding=remove_padding,
    )
    group.update_actor(call)
    by_rank = group.token_gradients()
    return {name: {row: grad for kept in by_rank for row, grad in kept[name].items()} for name in by_rank[0]}


def actor_batch(group: RayWorkerGroup) -> TensorDict:
    """Rows with old log-probabilities of the policy itself, so that nothing is clipped."""
    data = batch(20)
    data[ROW] = torch.arange(20)
    call = data.copy()
    tu.assign_non_tensor(call, calculate_entropy=False, compute_loss=False, temperature=1.0)
    output = group.compute_log_prob(call)
    data["old_log_probs"] = response_from_nested(output["log_probs"], data["response_mask"])
    return data


def with_masks(data: TensorDict, keep_adv_N, keep_ent_N, advantages_N) -> TensorDict:
    offsets = data["responses"].offsets()
    call = data.copy()
    call["advantages"] = torch.nested.nested_tensor_from_jagged(mask_advantage(advantages_N, keep_adv_N), offsets)
    call[KEEP_ENTROPY] = torch.nested.nested_tensor_from_jagged(keep_ent_N, offsets)
    return call


@pytest.mark.parametrize(
    ("ranks", "remove_padding"), [(1, True), (1, False), (2, True), (2, False), (4, True)], ids=str
)
def test_law_5_on_the_actor_worker(cluster, toy, ranks, remove_padding):
    group = start_actor(toy, ranks)
    data = actor_batch(group)
    generator = torch.Generator().manual_seed(0)
    tokens = len(data["responses"].values())
    keep_adv_N, keep_ent_N = (torch.rand(tokens, generator=generator) < 0.7 for _ in range(2))
    advantages_N = torch.randn(tokens, generator=generator)
    all_N = torch.ones(tokens, dtype=torch.bool)
    is_response_N = data["response_mask"].values().bool()
    for name, engine in BATCHING.items():
        group.set_batching(**engine)
        plain, masked = (
            update(group, with_masks(data, *keep_NN, advantages_N), remove_padding=remove_padding)
            for keep_NN in ((all_N, all_N), (keep_adv_N, keep_ent_N))
        )
        for kind, keep_N in (("log_probs", keep_adv_N), ("entropy", keep_ent_N)):
            plain_N, masked_N = on_responses(plain[kind], data), on_responses(masked[kind], data)
            assert plain_N[is_response_N].all() and not plain_N[~is_response_N].any(), f"{name}: {kind}"
            assert not masked_N[~keep_N].any(), f"{name}: a dropped token got a gradient of its {kind}"
            assert torch.equal(masked_N[keep_N], plain_N[keep_N]), f"{name}: another token's {kind} gradient changed"
    for worker in group.workers:
        ray.kill(worker)


def on_responses(by_row: dict[int, torch.Tensor], data: TensorDict) -> torch.Tensor:
    """Gradients at the positions that predict response tokens: prompt + t - 1 predicts token t."""
    widths = zip(data["prompts"].offsets().diff().tolist(), data["responses"].offsets().diff().tolist(), strict=True)
    return torch.cat([by_row[row][p - 1 : p + r - 1] for row, (p, r) in enumerate(widths)])
