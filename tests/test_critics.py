"""The mini-critic worker on real Ray ranks with FSDP2: seeds, isolation, checkpoints, batching."""

import contextlib
import gzip
from functools import partial
from pathlib import Path

import clusters
import pytest
import ray
import torch
from tensordict import TensorDict
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from transfer_queue import KVBatchMeta
from verl.single_controller.base.decorator import Dispatch, register
from verl.single_controller.ray import (
    RayClassWithInitArgs,
    RayResourcePool,
    RayWorkerGroup,
    create_colocated_worker_cls,
)
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.utils.losses import value_loss

from asyppo_verl.asyppo import ensemble_value
from asyppo_verl.checkpoint import check_critics
from asyppo_verl.critic_client import CriticClient
from asyppo_verl.critic_settings import critic_nodes, read_config
from asyppo_verl.critic_worker import (
    CRITIC_ID,
    RESPONSES,
    MiniCriticEnsembleWorker,
    ShuffledResponses,
    value_field,
    worker_config,
    worker_configs,
    worker_subgroups,
)
from asyppo_verl.mini_batches import cut, rank_major

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


class ProbedWorker(MiniCriticEnsembleWorker):
    """The worker with windows to look inside."""

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def weights(self) -> list[dict[str, torch.Tensor]]:
        """Full parameters of every critic of this rank."""
        return [
            {
                name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
                for name, value in critic.engine.module.state_dict().items()
            }
            for critic in self.critics.values()
        ]

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def parameters_here(self) -> list[int]:
        """How many parameters of each critic this rank keeps."""
        return [
            sum(parameter.to_local().numel() for parameter in critic.engine.module.parameters())
            for critic in self.critics.values()
        ]

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def held(self) -> list[int]:
        """The critics of this rank."""
        return list(self.critics)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def bring_heads_together(self, distance: float) -> None:
        """Move critic 1's head to within ``distance`` times their difference of critic 0's."""

        def summoned(module):
            return FSDP.summon_full_params(module) if isinstance(module, FSDP) else contextlib.nullcontext()

        first, second = (critic.engine.module for critic in self.critics.values())
        with summoned(first), summoned(second), torch.no_grad():
            head, other = (module.score.weight for module in (first, second))
            other.copy_(head + distance * (other - head))

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def set_head_seed(self, seed: int) -> None:
        self.head_seed = seed

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def set_batching(self, **engine: object) -> None:
        for critic in self.critics.values():
            for key, value in engine.items():
                setattr(critic.engine_config, key, value)


@pytest.fixture(scope="module")
def cluster():
    with clusters.started(__name__):
        yield


def start(compose, ranks: int, *overrides: str, subgroups: int = 1, worker: type = ProbedWorker) -> RayWorkerGroup:
    # Adam with a small eps turns the rounding of a gradient near 0 into whole steps of the learning rate.
    optimizer = ("critic.optim.lr=1e-2", "critic.optim.override_optimizer_config={eps: 1e-3}")
    optimizer += ("critic.optim.lr_scheduler_type=cosine", "critic.optim.total_training_steps=1000")
    config = compose(f"trainer.n_gpus_per_node={ranks}", *optimizer, *overrides)
    asyppo = read_config(config)
    workers = worker_configs(critic_nodes(config, asyppo))
    own = {"workers": tuple(workers), "head_seed": asyppo.head_seed, "subgroups": subgroups}
    cls = type("ProbedEnsemble", (worker,), own)
    group = RayWorkerGroup(
        resource_pool=RayResourcePool([ranks], use_gpu=True, max_colocate_count=3),
        ray_cls_with_init=create_colocated_worker_cls({"critic": RayClassWithInitArgs(cls=ray.remote(cls))}),
        device_name="cpu",
    ).spawn({"critic"})["critic"]
    group.reset()
    group.set_loss_fn(loss_of(config))
    return group


def loss_of(config) -> partial:
    """verl's value loss, as its trainer gives it to a critic."""
    return partial(value_loss, config=omega_conf_to_dataclass(config.critic))


def batch(rows: int, seed: int = 0, num_critics: int = 2) -> TensorDict:
    """Random rows of different lengths, some of them without response tokens (as padding rows are)."""
    generator = torch.Generator().manual_seed(seed)
    fields: dict[str, list[torch.Tensor]] = {}

    def add(name: str, value: torch.Tensor) -> None:
        fields.setdefault(name, []).append(value)

    for row in range(rows):
        prompt, response = (int(torch.randint(low, 8, (), generator=generator)) for low in (1, 2))
        ids = torch.randint(0, 256, (prompt + response,), generator=generator)
        is_response = torch.ones(response, dtype=torch.long) * (row % 5 != 4)
        add("input_ids", ids)
        add("position_ids", torch.arange(prompt + response))
        add("prompts", ids[:prompt])
        add("responses", ids[prompt:])
        add("response_mask", is_response)
        add("loss_mask", is_response)
        add("returns", torch.rand(response, generator=generator))
        for index in range(num_critics):
            add(value_field(index), torch.rand(response, generator=generator) / 10)
    data = TensorDict(
        {name: torch.nested.as_nested_tensor(values, layout=torch.jagged) for name, values in fields.items()},
        batch_size=rows,
    )
    tu.assign_non_tensor(data, temperature=1.0, compute_loss=False)
    return data


def train(
    group: RayWorkerGroup, index: int, data: TensorDict, mini_batch: int | None = None, **settings: object
) -> dict:
    call = data.copy()
    size = mini_batch or len(data)
    tu.assign_non_tensor(
        call,
        **{CRITIC_ID: index, "global_batch_size": size, "mini_batch_size": size, "epochs": 1, "seed": 1},
        dataloader_kwargs={"shuffle": False},
    )
    for key, value in {RESPONSES: None, **settings}.items():
        tu.assign_non_tensor_data(call, key, value)
    return group.train_mini_batch(call).get()["metrics"]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """To the bit."""
    return all(torch.equal(a[name], b[name]) for name in a)


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """To a thousandth of an optimizer step of ``start``'s critics."""
    torch.testing.assert_close(dict(found), dict(expected), rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def pair(cluster, toy):
    """Two ranks with two critics."""
    yield from _started(toy, 2)


@pytest.fixture(scope="module")
def single(cluster, toy):
    """One rank with two critics, the second one of the actor's size."""
    yield from _started(toy, 1, f"+asyppo.critic_overrides.1.model.path={toy}/actor")


@pytest.fixture(scope="module")
def whole(cluster, toy):
    """Two ranks with two critics, each rank with a whole copy of both; what checkpoints hold is left to verl."""
    yield from _started(toy, 2, "critic.fsdp.fsdp_size=1", "critic.checkpoint=null")


@pytest.fixture(scope="module")
def first_generation(cluster, toy):
    """Two ranks with two critics under FSDP1."""
    yield from _started(toy, 2, "critic.strategy=fsdp")


@pytest.fixture(scope="module")
def dealt(cluster, toy):
    """Four ranks, of which each of two critics has two."""
    yield from _started(toy, 4, subgroups=2)


@pytest.fixture(scope="module", params=["fsdp2", "fsdp"])
def half_precision(cluster, toy, request):
    """One rank with two critics in bf16 with gradient checkpointing, as on GPUs."""
    bf16 = ["critic.fsdp.mixed_precision.param_dtype=bf16", "critic.model.enable_gradient_checkpointing=True"]
    yield from _started(toy, 1, *bf16, f"critic.strategy={request.param}")


def _started(toy: Path, ranks: int, *overrides: str, subgroups: int = 1):
    from conftest import composing, overrides_for

    group = start(composing(overrides_for(toy)), ranks, *overrides, subgroups=subgroups)
    yield group
    for worker in group.workers:
        ray.kill(worker)


def test_heads_differ_between_critics_and_agree_between_ranks_and_runs(pair):
    first_rank, second_rank = pair.weights()
    assert all(same(a, b) for a, b in zip(first_rank, second_rank, strict=True)), "the ranks disagree"
    (head,) = [name for name in first_rank[0] if name.endswith("score.weight")]
    assert not torch.equal(first_rank[0][head], first_rank[1][head]), "the critics have the same head"
    bodies = [{name: value for name, value in w.items() if "score" not in name} for w in first_rank]
    assert same(*bodies), "the critics do not start from the same checkpoint"
    pair.set_head_seed(1001)
    pair.reset()
    assert same(pair.weights()[0][0], first_rank[1]), (
        "the first critic's seed is not head_seed, the second's not the next"
    )
    pair.set_head_seed(1000)
    pair.reset()
    assert all(same(a, b) for a, b in zip(first_rank, pair.weights()[0], strict=True)), "the seed does not fix the head"


def test_every_critic_evaluates_every_response_whatever_the_ranks(pair, single):
    pair.reset()
    single.reset()
    data = batch(20)
    by_two, by_one = (group.infer_batch(data.copy()).get() for group in (pair, single))
    lengths = data["responses"].offsets().diff()
    for index in range(2):
        assert torch.equal(by_two[value_field(index)].offsets().diff(), lengths)
    torch.testing.assert_close(by_two[value_field(0)].values(), by_one[value_field(0)].values(), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(by_two[value_field(0)].values(), by_two[value_field(1)].values(), atol=1e-3)


def test_values_are_those_of_the_model(single, toy):
    """Against plain transformers: position prompt + t - 1 is the value of response token t."""
    from transformers import AutoModelForTokenClassification

    single.reset()
    data = batch(6)
    weights = single.weights()[0][0]
    model = AutoModelForTokenClassification.from_pretrained(toy / "critic", num_labels=1, dtype=torch.float32)
    model.load_state_dict(weights)
    expected = []
    with torch.no_grad():
        for ids, prompt, response in zip(
            *(data[f].unbind() for f in ("input_ids", "prompts", "responses")), strict=True
        ):
            values = model(ids[None]).logits[0, :, 0]
            expected.append(values[len(prompt) - 1 : len(prompt) + len(response) - 1])
    found = single.infer_batch(data).get()[value_field(0)]
    torch.testing.assert_close(found.values(), torch.cat(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("index", [0, 1])
def test_training_a_critic_changes_only_that_critic(pair, index):
    pair.reset()
    before = pair.weights()[0]
    metrics = train(pair, index, batch(20))
    after = pair.weights()
    assert not same(before[index], after[0][index]) and same(before[1 - index], after[0][1 - index])
    assert all(same(a, b) for a, b in zip(*after, strict=True)), "the ranks drifted apart"
    assert metrics["critic/vf_loss"] and metrics["grad_norm"][0] > 0


def test_values_are_clipped_around_the_critics_own_old_values(single):
    """With a huge old value for critic 1 only, clipping changes critic 1's loss and not critic 0's."""
    losses = {}
    for far_off in (None, 0, 1):
        single.reset()
        data = batch(20)
        if far_off is not None:
            data[value_field(far_off)] = data[value_field(far_off)] + 100
        losses[far_off] = [train(single, index, data)["critic/vf_loss"][0] for index in range(2)]
    assert losses[0][0] > 100 * losses[None][0] and losses[0][1] == losses[None][1]
    assert losses[1][1] > 100 * losses[None][1] and losses[1][0] == losses[None][0]


@pytest.mark.parametrize("num_critics", [1, 2])
def test_the_number_of_ranks_changes_an_update_by_the_order_of_summation_only(pair, single, compose, num_critics):
    """Three optimizer steps of one critic on rows of any length, put in order by the driver for one rank and for two."""
    data, steps, mini_batch = batch(24), 3, 8
    keys = [f"{row:02}_0_0" for row in range(24)]
    tags = [{"seq_len": int(length)} for length in data["input_ids"].offsets().diff()]
    meta = KVBatchMeta(partition_id="train", keys=keys, tags=tags)
    reached = {}
    for group in (pair, single):
        group.reset()
        group.set_batching(use_dynamic_bsz=True, max_token_len_per_gpu=128)
        config = compose(f"trainer.n_gpus_per_node={group.world_size}", f"+asyppo.num_critics={num_critics}")
        calls = CriticClient(group, config, read_config(config), eos_token_id=0)
        rows = (
            calls._verls_order(meta, mini_batch, actor_ranks=2)
            if num_critics == 1
            else rank_major(calls._dealt(meta, cut(keys, steps)))
        )
        order = [keys.index(key) for key in rows]
        call = tu.index_select_tensor_dict(data, torch.tensor(order))
        tu.assign_non_tensor(call, temperature=1.0, compute_loss=False)
        norms = train(group, 0, call, mini_batch=mini_batch)["grad_norm"]
        reached[group.world_size] = order, norms, group.weights()[0][0]
    assert len(norms) == steps and reached[1][0] != reached[2][0]
    assert reached[1][1] == pytest.approx(reached[2][1], rel=1e-5)
    assert_close(reached[1][2], reached[2][2])


@pytest.mark.parametrize("loss_agg_mode", ["token-mean", "seq-mean-token-mean"])
def test_law_7_fillers_neither_move_nor_scale_an_update(request, pair, single, compose, loss_agg_mode):
    """Two steps on 6 and 5 responses: on two ranks with a filler, shuffled or not, and on one rank without any."""
    loss = loss_of(compose(f"actor_rollout_ref.actor.loss_agg_mode={loss_agg_mode}"))
    data, filler, first, second = batch(24), 4, [0, 1, 2, 3, 5, 6], [7, 8, 10, 11, 12]
    assert not data["response_mask"][filler].any()

    def rows(*order: int) -> TensorDict:
        part = tu.index_select_tensor_dict(data, torch.tensor(order))
        tu.assign_non_tensor(part, temperature=1.0, compute_loss=False)
        return part

    for group in (pair, single):
        group.reset()
        group.set_loss_fn(loss)
        request.addfinalizer(partial(group.set_loss_fn, loss_of(compose())))
        group.set_batching(use_dynamic_bsz=True, max_token_len_per_gpu=24)
    steps = [train(single, 0, rows(*step)) for step in (first, second)]
    filled = rows(*first[:3], *second[:3], *first[3:], *second[3:], filler)
    told = ((3, 3), (3, 2))
    found = train(pair, 0, filled, mini_batch=6, **{RESPONSES: told})
    for name in ("grad_norm", "critic/vf_loss", "critic/vpred_mean"):
        assert found[name] == pytest.approx([step[name][0] for step in steps], rel=1e-5), name
    assert_close(pair.weights()[0][0], single.weights()[0][0])

    # Shuffled, the responses of each rank change places; its fillers keep theirs.
    order = [6 * rank + row for rank in range(2) for row in ShuffledResponses([n[rank] for n in told], 3, 1 + rank)]
    by_hand = tu.index_select_tensor_dict(filled, torch.tensor(order))
    tu.assign_non_tensor(by_hand, temperature=1.0, compute_loss=False)
    norms = []
    for part, shuffle in ((filled, True), (by_hand, False)):
        pair.reset()
        told_and_shuffled = {RESPONSES: told, "dataloader_kwargs": {"shuffle": shuffle}}
        norms.append(train(pair, 0, part, mini_batch=6, **told_and_shuffled)["grad_norm"])
    assert norms[0] == norms[1] != found["grad_norm"]


def test_in_bf16_sigma_has_the_resolution_of_float32(half_precision, single):
    """Also where the critics agree: without a head in float32, values near 0.6 differ in steps of 0.004."""
    half_precision.reset()
    single.reset()
    data = batch(200)
    exact = single.infer_batch(data.copy()).get()[value_field(0)].values()
    for distance in (1.0, 0.01):
        half_precision.bring_heads_together(distance)
        output = half_precision.infer_batch(data.copy()).get()
        values = torch.stack([output[value_field(index)].values() for index in range(2)])
        assert values.dtype == torch.float32
        torch.testing.assert_close(values[0], exact, rtol=0.05, atol=0.05)
        assert (values[0] - values[1]).abs().max() < 5 * distance
        _, sigma = ensemble_value(values)
        assert len(sigma.unique()) > 0.99 * len(sigma)
        assert (values == values.bfloat16().float()).float().mean() < 0.05, "the values have the steps of bf16"


def test_in_bf16_loss_and_gradients_are_those_of_float32(half_precision, single):
    data = batch(40)
    found = []
    for group in (half_precision, single):
        group.reset()
        group.set_batching(use_dynamic_bsz=True, max_token_len_per_gpu=64)
        found.append(train(group, 0, data))
    half, exact = found
    assert half["critic/vf_loss"][0] == pytest.approx(exact["critic/vf_loss"][0], rel=0.01)
    assert half["grad_norm"][0] == pytest.approx(exact["grad_norm"][0], rel=0.02)
    before = half_precision.weights()[0][0]
    (head,) = [name for name in before if name.endswith("score.weight")]
    half_precision.reset()
    change, expected = (
        group_weights[head] - half_precision.weights()[0][0][head] for group_weights in (before, single.weights()[0][0])
    )
    # Adam's first step has the sign of the gradient.
    assert (change.sign() == expected.sign()).float().mean() > 0.98


def test_small_critics_can_be_kept_whole_on_every_rank(pair, whole):
    """With fsdp_size=1 nothing is gathered for a forward pass; an optimizer step differs by the order of summation only."""
    pair.reset()
    whole.reset()
    full = sum(value.numel() for value in whole.weights()[0][0].values())
    assert whole.parameters_here() == [[full, full]] * 2
    assert [sum(sizes) for sizes in zip(*pair.parameters_here(), strict=True)] == [full, full]
    data = batch(20)
    values = [group.infer_batch(data.copy()).get()[value_field(0)].values() for group in (pair, whole)]
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6)
    norms = [train(group, 0, data)["grad_norm"][0] for group in (pair, whole)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    of_rank = whole.weights()
    assert same(of_rank[0][0], of_rank[1][0]), "the copies drifted apart"
    assert_close(pair.weights()[0][0], of_rank[0][0])


def test_fsdp1_computes_what_fsdp2_does(pair, first_generation):
    groups = (pair, first_generation)
    data = batch(20)
    for group in groups:
        group.reset()
        group.set_batching(use_dynamic_bsz=True, max_token_len_per_gpu=128)
    for index in range(2):
        values = [group.infer_batch(data.copy()).get()[value_field(index)].values() for group in groups]
        torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6)
        norms = [train(group, index, data)["grad_norm"][0] for group in groups]
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    for expected, found in zip(*(group.weights()[0] for group in groups), strict=True):
        assert_close(expected, found)


@pytest.mark.parametrize("layout", ["pair", "first_generation", "whole"])
def test_checkpoints_restore_weights_optimizer_and_schedule(request, layout, tmp_path):
    group = request.getfixturevalue(layout)
    group.reset()
    data = batch(20)
    for index in range(2):
        train(group, index, data)
    saved = group.weights()[0]
    group.save_checkpoint(str(tmp_path), None, 1, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["critic_0", "critic_1"]
    after_more = []
    for _ in range(2):
        for index in range(2):
            train(group, index, data)
        after_more.append(group.weights()[0])
        group.load_checkpoint(str(tmp_path))
        assert all(same(a, b) for a, b in zip(saved, group.weights()[0], strict=True))
    # The same step after loading gives the same weights only if Adam's moments came back too.
    assert all(same(a, b) for a, b in zip(*after_more, strict=True))


def test_the_saved_configuration_names_the_class_that_was_saved(pair, tmp_path):
    from transformers import AutoConfig

    pair.save_checkpoint(str(tmp_path), None, 1, None)
    config = AutoConfig.from_pretrained(tmp_path / "critic_0" / "huggingface")
    assert config.architectures == ["Qwen3ForTokenClassification"]


def test_ranks_are_dealt_to_critics_in_runs_as_the_driver_groups_them(dealt):
    """Else a critic's calls would reach ranks of another one, and wait for ever."""
    assert dealt.held() == [[0], [0], [1], [1]]
    assert [group.held() for group in worker_subgroups(dealt, 2)] == [[[0], [0]], [[1], [1]]]


def test_a_critic_on_its_own_share_is_the_critic_that_spans_as_many_ranks(pair, dealt):
    """Values, an optimizer step and the metrics of both agree to the last bit, though nothing is shared."""
    for group in (pair, dealt):
        group.reset()
        group.set_batching(use_dynamic_bsz=True, max_token_len_per_gpu=128)
    data = batch(20)
    expected = pair.infer_batch(data.copy()).get()
    answers = [answer for answer in ray.get(dealt.infer_batch(data.copy()).futures) if answer is not None]
    for index, subgroup in enumerate(worker_subgroups(dealt, 2)):
        assert subgroup.world_size == 2
        parts = [answer[value_field(index)].values() for answer in answers if value_field(index) in answer]
        assert torch.equal(torch.cat(parts), expected[value_field(index)].values())
        metrics = [train(group, index, data) for group in (pair, subgroup)]
        for key in ("critic/vf_loss", "grad_norm", "lr"):
            assert metrics[0][key] == metrics[1][key], key
    trained, of_rank = pair.weights()[0], [of_rank for (of_rank,) in dealt.weights()]
    for rank in range(4):
        assert same(trained[rank // 2], of_rank[rank])


def test_checkpoints_move_between_placements_with_as_many_ranks(pair, dealt, tmp_path):
    for group in (pair, dealt):
        group.reset()
        group.set_batching(use_dynamic_bsz=True, max_token_len_per_gpu=128)
    data = batch(20)
    groups = worker_subgroups(dealt, 2)
    for index in range(2):
        train(pair, index, data)
    pair.save_checkpoint(str(tmp_path / "pair"), None, 1, None)
    dealt.load_checkpoint(str(tmp_path / "pair"))
    dealt.save_checkpoint(str(tmp_path / "dealt"), None, 1, None)
    pair.load_checkpoint(str(tmp_path / "dealt"))
    # The same step afterwards gives the same weights only if Adam's moments came along.
    for index in range(2):
        train(pair, index, data)
        train(groups[index], index, data)
        assert same(pair.weights()[0][index], groups[index].weights()[0][0])


def test_a_checkpoint_of_another_number_of_ranks_is_refused_by_name(pair, single, tmp_path):
    single.save_checkpoint(str(tmp_path), None, 1, None)
    with pytest.raises(
        Exception, match=r"critic_0 has no model_world_size_2_rank_\d.pt \(it has .*model_world_size_1"
    ) as caught:
        pair.load_checkpoint(str(tmp_path))
    assert str(tmp_path) in str(caught.value) and "asyppo.placement" in str(caught.value)


def test_a_node_needs_only_the_folders_of_its_own_critics(tmp_path):
    (tmp_path / "critic_1").mkdir()
    check_critics(tmp_path, 2, held=[1])
    with pytest.raises(ValueError, match=r"missing \['critic_0'\], unexpected nothing"):
        check_critics(tmp_path, 2, held=[0])


def test_critics_are_profiled_as_verl_profiles_its_critic(cluster, compose, tmp_path):
    """What verl starts on the worker group notes the steps of the critic that trains."""
    profiler = [f"critic.profiler.{setting}" for setting in ("enable=True", "tool=torch", f"save_path={tmp_path}")]
    group = start(compose, 1, *profiler, "critic.profiler.tool_config.torch.contents=[cpu]")
    group.start_profile(profile_step=1)
    for index in range(2):
        train(group, index, batch(4))
    group.stop_profile()
    ray.kill(group.workers[0])
    (trace,) = (path for path in tmp_path.rglob("*") if path.is_file())
    text = (gzip.open if trace.suffix == ".gz" else open)(trace, "rt").read()
    assert text.count('"train_batch"') == 2, "a step of each critic"


def test_the_critics_own_batching_keys_reach_the_engine(compose):
    config = compose(
        "critic.use_dynamic_bsz=False",
        "critic.ppo_micro_batch_size_per_gpu=2",
        "critic.forward_micro_batch_size_per_gpu=4",
        "critic.ppo_max_token_len_per_gpu=111",
        "critic.forward_max_token_len_per_gpu=222",
        "critic.fsdp.param_offload=True",
        "critic.optim.clip_grad=0.25",
    )
    worker = worker_config(config.critic)
    engine = worker.engine_config
    assert (engine.use_dynamic_bsz, engine.param_offload, worker.optimizer_config.clip_grad) == (False, True, 0.25)
    assert (engine.micro_batch_size_per_gpu, engine.infer_micro_batch_size_per_gpu) == (2, 4)
    assert (engine.max_token_len_per_gpu, engine.infer_max_token_len_per_gpu) == (111, 222)
    node = compose("+critic.ppo_infer_max_token_len_per_gpu=333").critic
    assert worker_config(node).engine_config.infer_max_token_len_per_gpu == 333


def test_critics_with_the_same_settings_share_one_configuration(compose):
    config = compose("+asyppo.num_critics=3", "+asyppo.critic_overrides.1.optim.lr=0.5")
    asyppo = read_config(config)
    first, second, third = worker_configs(critic_nodes(config, asyppo))
    assert first is third and first is not second
    assert first.model_config.tokenizer is second.model_config.tokenizer
    assert (first.optimizer_config.lr, second.optimizer_config.lr) == (1e-5, 0.5)
