"""Where the critics run, and that a refusal names numbers that work."""

import pytest

from asyppo_verl.config import AsyPPOConfig, CriticPool
from asyppo_verl.critic_settings import read_config, runs
from asyppo_verl.preflight import prepare
from asyppo_verl.preflight.gpus import critic_ranks

POOL = "+asyppo.placement=pool"
SPLIT = "+asyppo.placement=split"


def test_ranks_of_a_critic(compose):
    def ranks(*overrides: str) -> int:
        config = compose("trainer.n_gpus_per_node=8", "trainer.nnodes=2", *overrides)
        return critic_ranks(runs(config, read_config(config))[0])

    pool = ("+asyppo.pool.n_gpus_per_node=4", "+asyppo.pool.nnodes=3")
    assert ranks() == 16
    assert ranks(POOL, *pool) == 12
    assert ranks(SPLIT, *pool) == 6 and ranks(SPLIT, "+asyppo.num_critics=3", *pool) == 4
    assert ranks(SPLIT, "+asyppo.num_critics=1", *pool) == 12


@pytest.mark.parametrize("mode", ["sync", "colocate_async", "separate_async"])
@pytest.mark.parametrize(("placement", "subgroups"), [("colocated", 1), ("pool", 1), ("split", 2)])
def test_the_critics_get_their_gpus_in_every_mode(compose, mode, placement, subgroups):
    """Through the trainers' own method: the actor's pool stays what it was, and its worker what the mode makes it."""
    from verl.trainer.ppo.utils import Role
    from verl.trainer.ppo.v1 import get_trainer_cls

    pool = [] if placement == "colocated" else ["+asyppo.pool.n_gpus_per_node=4", "+asyppo.pool.nnodes=2"]
    cls = get_trainer_cls(f"asyppo_{mode}")
    trainer = cls.__new__(cls)
    trainer.config = compose(
        "trainer.n_gpus_per_node=8", f"+asyppo.placement={placement}", "+asyppo.head_seed=7", *pool
    )
    trainer.asyppo = prepare(trainer.config)
    trainer._init_resource_pool_mgr()

    manager, workers = trainer.resource_pool_manager, trainer.role_worker_mapping
    expected = {"global_pool": [8]} if placement == "colocated" else {"global_pool": [8], "critic_pool": [4, 4]}
    assert manager.resource_pool_spec == expected
    assert manager.mapping[Role.Critic] == list(expected)[-1] and manager.mapping[Role.ActorRollout] == "global_pool"
    critics = workers[Role.Critic].__ray_actor_class__
    assert critics.subgroups == subgroups and len(critics.workers) == 2 and not critics.compiles
    assert critics.head_seed == 7
    actor = workers[Role.ActorRollout].__ray_actor_class__.__name__
    assert actor == ("DetachActorWorker" if mode == "separate_async" else "ActorRolloutRefWorker")


def test_the_critics_are_compiled_if_asked(compose):
    from verl.trainer.ppo.utils import Role
    from verl.trainer.ppo.v1 import get_trainer_cls

    trainer = get_trainer_cls("asyppo_sync").__new__(get_trainer_cls("asyppo_sync"))
    trainer.config = compose("+asyppo.compile_critics=True")
    trainer.asyppo = prepare(trainer.config)
    trainer._init_resource_pool_mgr()
    assert trainer.role_worker_mapping[Role.Critic].__ray_actor_class__.compiles


def test_an_empty_pool_is_the_default():
    assert AsyPPOConfig().pool == CriticPool(n_gpus_per_node=0, nnodes=1)
    assert AsyPPOConfig.from_node({"placement": "pool", "pool": {"n_gpus_per_node": 2}}).pool == CriticPool(2, 1)
