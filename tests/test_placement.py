"""Where the critics run, and what is refused before Ray starts: every message names numbers that work."""

import re

import pytest

from asyppo_verl.config import AsyPPOConfig, CriticPool
from asyppo_verl.critic_settings import critic_nodes
from asyppo_verl.placement import critic_ranks
from asyppo_verl.preflight import prepare, read_config
from asyppo_verl.preflight.combinations import check_against_verl
from asyppo_verl.preflight.single_critics import check_critic

POOL = "+asyppo.placement=pool"
SPLIT = "+asyppo.placement=split"

REFUSED = [
    ("+asyppo.placement=apart", ["asyppo.placement='apart'", "colocated, pool, split"]),
    ("+asyppo.placement=splits", ["did you mean split?"]),
    ("+asyppo.pool=4", ["asyppo.pool=4", "{n_gpus_per_node: 4, nnodes: 1}"]),
    ("+asyppo.pool.gpus=4", ["asyppo.pool.gpus=4", "valid keys: n_gpus_per_node, nnodes"]),
    ("+asyppo.pool.n_gpus_per_node=-1", ["asyppo.pool.n_gpus_per_node=-1", "whole number"]),
    ("+asyppo.pool.nnodes=1.5", ["asyppo.pool.nnodes=1.5", "whole number"]),
    ("+asyppo.pool.n_gpus_per_node=4", ["asyppo.pool.n_gpus_per_node=4 is idle", "asyppo.placement=colocated"]),
    (POOL, ["asyppo.placement=pool", "asyppo.pool.n_gpus_per_node=0", "set asyppo.pool.n_gpus_per_node=1 or more"]),
    (SPLIT, ["asyppo.placement=split", "set asyppo.pool.n_gpus_per_node=2 or a multiple"]),
    (f"{POOL} +asyppo.pool.n_gpus_per_node=2 +asyppo.pool.nnodes=0", ["asyppo.pool.nnodes=0", "asyppo.pool.nnodes=1"]),
    (f"{SPLIT} +asyppo.pool.n_gpus_per_node=3", ["the 3 GPUs", "asyppo.num_critics=2", "2 or 4 GPUs would do"]),
    (f"{SPLIT} +asyppo.pool.n_gpus_per_node=1", ["the 1 GPUs", "2 GPUs would do"]),
    (
        f"{POOL} +asyppo.pool.n_gpus_per_node=6",
        ["32 responses", "6 data-parallel ranks", "multiple of 6", "1, 2, 4 or 8 GPUs"],
    ),
    (
        f"{SPLIT} +asyppo.pool.n_gpus_per_node=6",
        ["3 data-parallel ranks", "multiple of 3", "2, 4 or 8 GPUs", "asyppo.num_critics=2"],
    ),
    (
        f"{SPLIT} +asyppo.pool.n_gpus_per_node=4 critic.fsdp.ulysses_sequence_parallel_size=4",
        ["ulysses_sequence_parallel_size=4", "the 2 GPUs that a critic has", "set one of 1 or 2"],
    ),
    (
        f"{POOL} +asyppo.pool.n_gpus_per_node=4 critic.fsdp.fsdp_size=3",
        ["critic.fsdp.fsdp_size=3", "the 4 GPUs", "1, 2 or 4"],
    ),
    (
        f"{POOL} +asyppo.pool.n_gpus_per_node=4 +asyppo.critic_overrides.1.fsdp.fsdp_size=3",
        ["asyppo.critic_overrides.1.fsdp.fsdp_size=3", "critic 1"],
    ),
    (
        "critic.strategy=fsdp critic.fsdp.fsdp_size=1 trainer.n_gpus_per_node=2",
        ["critic.fsdp.fsdp_size=1 with critic.strategy=fsdp", "never averaged", "set critic.strategy=fsdp2"],
    ),
    (
        f"critic.strategy=fsdp {POOL} +asyppo.pool.n_gpus_per_node=2 +asyppo.critic_overrides.1.fsdp.fsdp_size=1",
        ["asyppo.critic_overrides.1.fsdp.fsdp_size=1", "the 2 GPUs that critic 1 has"],
    ),
    (
        "actor_rollout_ref.actor.strategy=fsdp actor_rollout_ref.actor.fsdp_config.fsdp_size=1 trainer.n_gpus_per_node=2",
        ["actor_rollout_ref.actor.fsdp_config.fsdp_size=1", "set actor_rollout_ref.actor.strategy=fsdp2"],
    ),
    (
        f"{POOL} +asyppo.pool.n_gpus_per_node=4 trainer.n_gpus_per_node=8 +ray_kwargs.ray_init.num_gpus=8",
        ["ray_kwargs.ray_init.num_gpus=8", "needs 12: 8 (trainer) + 4 (asyppo.pool)", "raise it to 12"],
    ),
    (
        f"{POOL} +asyppo.pool.n_gpus_per_node=4 +ray_kwargs.ray_init.num_gpus=8 trainer.v1.trainer_mode=separate_async "
        "actor_rollout_ref.rollout.nnodes=1 actor_rollout_ref.rollout.n_gpus_per_node=4",
        ["needs 9: 1 (trainer) + 4 (asyppo.pool) + 4 (actor_rollout_ref.rollout)"],
    ),
]


@pytest.mark.parametrize(("overrides", "fragments"), REFUSED, ids=[overrides for overrides, _ in REFUSED])
def test_refused(compose, overrides, fragments):
    with pytest.raises(ValueError) as caught:
        prepare(compose(*overrides.split()))
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        "critic.fsdp.fsdp_size=1 trainer.n_gpus_per_node=2",
        "critic.strategy=fsdp critic.fsdp.fsdp_size=1",
        "critic.strategy=fsdp critic.fsdp.fsdp_size=2 trainer.n_gpus_per_node=4",
        f"critic.strategy=fsdp critic.fsdp.fsdp_size=1 trainer.n_gpus_per_node=2 {POOL} +asyppo.pool.n_gpus_per_node=1",
    ],
)
def test_whole_copies_are_accepted_where_they_are_averaged_or_there_is_one(compose, overrides):
    prepare(compose(*overrides.split()))


@pytest.mark.parametrize("placement", ["pool", "split"])
def test_the_numbers_that_a_refusal_names_work(compose, placement):
    """Whatever is refused, every number of GPUs in the message is accepted."""
    config = compose(f"+asyppo.placement={placement}", "+asyppo.pool.n_gpus_per_node=0")

    def tried(gpus: int) -> str:
        config.asyppo.pool.n_gpus_per_node = gpus
        try:
            asyppo = read_config(config)
            check_against_verl(config, asyppo)
            check_critic(critic_nodes(config, asyppo)[0], config, asyppo)
        except ValueError as error:
            return str(error)
        return ""

    parts = 2 if placement == "split" else 1
    for ranks in range(1, 40):
        message = tried(ranks)
        # The 8 prompts x 4 responses of a mini-batch are evaluated in equal numbers on every rank.
        works = ranks % parts == 0 and 32 % (ranks // parts) == 0
        assert bool(message) != works, ranks
        named = re.search(r"((?:\d+, )*(?:\d+ or )?\d+) GPUs(?: \(asyppo| would)", message)
        assert bool(message) == bool(named)
        for gpus in re.findall(r"\d+", named[1]) if named else []:
            assert tried(int(gpus)) == "", message


def test_ranks_of_a_critic(compose):
    def ranks(*overrides: str) -> int:
        config = compose("trainer.n_gpus_per_node=8", "trainer.nnodes=2", *overrides)
        return critic_ranks(config, read_config(config))

    pool = ("+asyppo.pool.n_gpus_per_node=4", "+asyppo.pool.nnodes=3")
    assert ranks() == 16
    assert ranks(POOL, *pool) == 12
    assert ranks(SPLIT, *pool) == 6 and ranks(SPLIT, "+asyppo.num_critics=3", *pool) == 4
    assert ranks(SPLIT, "+asyppo.num_critics=1", *pool) == 12


@pytest.mark.parametrize("mode", ["sync", "colocate_async", "separate_async"])
@pytest.mark.parametrize(("placement", "shares"), [("colocated", 1), ("pool", 1), ("split", 2)])
def test_the_critics_get_their_gpus_in_every_mode(compose, mode, placement, shares):
    """Through the trainers' own method: the actor's pool stays what it was, and its worker what the mode makes it."""
    from verl.trainer.ppo.utils import Role
    from verl.trainer.ppo.v1 import get_trainer_cls

    pool = [] if placement == "colocated" else ["+asyppo.pool.n_gpus_per_node=4", "+asyppo.pool.nnodes=2"]
    cls = get_trainer_cls(f"asyppo_{mode}")
    trainer = cls.__new__(cls)
    trainer.config = compose("trainer.n_gpus_per_node=8", f"+asyppo.placement={placement}", *pool)
    trainer.asyppo = prepare(trainer.config)
    trainer._init_resource_pool_mgr()

    manager, workers = trainer.resource_pool_manager, trainer.role_worker_mapping
    expected = {"global_pool": [8]} if placement == "colocated" else {"global_pool": [8], "critic_pool": [4, 4]}
    assert manager.resource_pool_spec == expected
    assert manager.mapping[Role.Critic] == list(expected)[-1] and manager.mapping[Role.ActorRollout] == "global_pool"
    critics = workers[Role.Critic].__ray_actor_class__
    assert critics.shares == shares and len(critics.specs) == 2
    actor = workers[Role.ActorRollout].__ray_actor_class__.__name__
    assert actor == ("DetachActorWorker" if mode == "separate_async" else "ActorRolloutRefWorker")


def test_an_empty_pool_is_the_default():
    assert AsyPPOConfig().pool == CriticPool(n_gpus_per_node=0, nnodes=1)
    assert AsyPPOConfig.from_node({"placement": "pool", "pool": {"n_gpus_per_node": 2}}).pool == CriticPool(2, 1)
