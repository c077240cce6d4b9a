"""Settings that cannot work, and what their refusal must say: the overrides, then fragments of one line.

TOY is the folder of the toy task.
"""

POOL, SPLIT = "+asyppo.placement=pool", "+asyppo.placement=split"
OWN = "+asyppo.critic_overrides.1"
STEPS = "trainer.resume_mode=resume_path"

SETTINGS = [
    # options
    ("+asyppo.num_critics=-1", ["asyppo.num_critics=-1", "at least 1"]),
    ("+asyppo.num_critics=0", ["asyppo.num_critics=0", "at least 1"]),
    ("+asyppo.num_critics=null", ["asyppo.num_critics=None", "whole number"]),
    ("+asyppo.num_critics=two", ["asyppo.num_critics='two'", "whole number"]),
    ("+asyppo.num_critics=2.5", ["asyppo.num_critics=2.5", "whole number"]),
    ("+asyppo.num_critics=true", ["asyppo.num_critics=True", "whole number"]),
    (
        "+asyppo.num_critics=5",
        ["rollout.n=4", "num_critics=5", "raise n, lower num_critics, or", "asyppo.shard=prompt"],
    ),
    ("+asyppo.critic_lam=abc", ["asyppo.critic_lam='abc'", "number"]),
    ("+asyppo.critic_lam=-0.5", ["asyppo.critic_lam=-0.5", "[0, 1]"]),
    ("+asyppo.critic_lam=1.5", ["asyppo.critic_lam=1.5", "[0, 1]"]),
    ("+asyppo.adv_mask_fraction=1", ["asyppo.adv_mask_fraction=1", "[0, 1)"]),
    ("+asyppo.adv_mask_fraction=-0.1", ["asyppo.adv_mask_fraction=-0.1", "[0, 1)"]),
    ("+asyppo.adv_mask_fraction=nan", ["asyppo.adv_mask_fraction=nan", "[0, 1)"]),
    ("+asyppo.adv_mask_fraction={a:1}", ["asyppo.adv_mask_fraction={'a': 1}", "number"]),
    ("+asyppo.adv_mask_fraction=0.9", ["adv_mask_fraction=0.9", "entropy_filter_fraction=0.2", "more than 1"]),
    ("+asyppo.entropy_filter_fraction=inf", ["asyppo.entropy_filter_fraction=inf", "[0, 1)"]),
    ("+asyppo.shard=null", ["asyppo.shard=None", "group, prompt, none"]),
    ("+asyppo.shard=[group]", ["asyppo.shard=['group']", "group, prompt, none"]),
    ("+asyppo.shard=row", ["asyppo.shard='row'", "group, prompt, none"]),
    ("+asyppo.head_seed=1.5", ["asyppo.head_seed=1.5", "whole number"]),
    ("+asyppo.head_seed=-1", ["asyppo.head_seed=-1", "[0, 2**32)"]),
    ("+asyppo.compile_critics=True critic.strategy=fsdp", ["compile_critics=True", "set critic.strategy=fsdp2"]),
    (
        "+asyppo.compile_critics=True critic.model.enable_activation_offload=True",
        ["compile_critics=True", "set critic.model.enable_activation_offload=False"],
    ),
    ("+asyppo.compile_critics=1", ["asyppo.compile_critics=1", "true or false"]),
    ("+asyppo.adaptive_lam=0.95", ["asyppo.adaptive_lam=0.95", "true or false"]),
    ("+asyppo.update_critics_first=1", ["asyppo.update_critics_first=1", "true or false"]),
    ("+asyppo=[1]", ["asyppo=[1]", "+asyppo.num_critics=2"]),
    ("+asyppo.num_critic=3", ["asyppo.num_critic=3", "did you mean num_critics?"]),
    ("+asyppo.mask_fraction=0.1", ["asyppo.mask_fraction=0.1", "did you mean adv_mask_fraction?"]),
    ("+asyppo.critic_overrides=[1]", ["critic_overrides=[1]", "map"]),
    ("+asyppo.critic_overrides.x.optim.lr=1", ["critic 'x'", "0 to 1"]),
    ("+asyppo.critic_overrides.7.optim.lr=1", ["critic 7", "num_critics=2"]),
    ("+asyppo.critic_overrides.0.ppo_epochs=2", ["critic_overrides.0.ppo_epochs", "its own model, optim"]),
    ("+asyppo.critic_overrides.0.model=text", ["critic_overrides.0.model='text'", "mapping"]),
    (f"{OWN}=3", ["critic_overrides.1=3", "mapping"]),
    (f"{OWN}.optimm.lr=1", ["critic_overrides.1.optimm", "did you mean optim?"]),
    (f"{OWN}.ppo_infer_max_token_len_per_gpu=1", ["ppo_infer_max_token_len_per_gpu", "its own model"]),
    (f"{OWN}.fsdp.ulysses_sequence_parallel_size=2", ["ulysses_sequence_parallel_size", "critic 1"]),
    # the method's name, misspelt or misplaced
    ("algorithm.adv_estimator=AsyPPO", ["algorithm.adv_estimator='AsyPPO'", "spelt asyppo"]),
    ("algorithm.adv_estimator=asy_ppo", ["algorithm.adv_estimator='asy_ppo'", "spelt asyppo"]),
    ("+num_critics=3", ["num_critics=3", "below asyppo", "+asyppo.num_critics"]),
    ("+algorithm.asyppo.num_critics=3", ["algorithm.asyppo={'num_critics': 3}", "below asyppo"]),
    # single critics are asked what all are
    (f"{OWN}.optim.lrr=1", ["critic_overrides.1.optim.lrr", "did you mean lr?"]),
    (f"{OWN}.optim.lr=abc", ["critic_overrides.1.optim.lr='abc'", "number"]),
    (f"{OWN}.optim.clip_grad=0", ["critic_overrides.1.optim.clip_grad=0", "above 0"]),
    (f"{OWN}.optim.lr_scheduler_type=cosin", ["asyppo.critic_overrides.1.optim: verl cannot use"]),
    (f"{OWN}.model.lora_rank=8", ["critic_overrides.1.model.lora_rank=8", "lora_rank=0"]),
    (f"{OWN}.model.path=/nowhere", ["asyppo.critic_overrides.1.model.path=/nowhere", "verl cannot use"]),
    (f"{OWN}.model.tokenizer_path=/nowhere", ["asyppo.critic_overrides.1.model", "/nowhere"]),
    (f"{OWN}.fsdp.strategy=megatron", ["critic_overrides.1.fsdp.strategy=megatron", "critic.strategy=fsdp2"]),
    (f"{OWN}.fsdp.fsdp_size=x", ["critic_overrides.1.fsdp.fsdp_size='x'", "number"]),
    (f"{OWN}.use_dynamic_bsz=maybe", ["critic_overrides.1.use_dynamic_bsz='maybe'", "True or False"]),
    (
        f"{OWN}.use_dynamic_bsz=False {OWN}.ppo_micro_batch_size_per_gpu=3",
        ["forward_micro_batch_size_per_gpu=3", "divisor of 32"],
    ),
    (
        f"{OWN}.use_dynamic_bsz=False",
        ["critic.ppo_micro_batch_size_per_gpu=None", "critic_overrides.1.use_dynamic_bsz=False"],
    ),
    # switches and numbers that are text, groups that are none
    ("critic.use_dynamic_bsz=no", ["critic.use_dynamic_bsz='no'", "True or False"]),
    ("critic.enable=no", ["critic.enable='no'", "remove it"]),
    ("algorithm.use_kl_in_reward=maybe", ["algorithm.use_kl_in_reward='maybe'", "True or False"]),
    ("trainer.val_before_train=no", ["trainer.val_before_train='no'", "True or False"]),
    ("actor_rollout_ref.actor.use_kl_loss=off", ["actor_rollout_ref.actor.use_kl_loss='off'", "True or False"]),
    ("critic.ppo_mini_batch_size=eight", ["critic.ppo_mini_batch_size='eight'", "number"]),
    ("actor_rollout_ref.actor.optim.lr=nan", ["actor_rollout_ref.actor.optim.lr=nan", "number"]),
    ("algorithm.gamma=nan", ["algorithm.gamma=nan", "number"]),
    ("algorithm.lam=abc", ["algorithm.lam='abc'", "number"]),
    ("critic.optim=3", ["critic.optim=3", "group of settings"]),
    ("critic.optim.lr=${nowhere.lr}", ["critic.optim.lr", "nowhere.lr"]),
    # numbers that everything else divides by, or that stop a run at its first update
    ("actor_rollout_ref.rollout.n=0", ["actor_rollout_ref.rollout.n=0", "1 or more"]),
    ("actor_rollout_ref.rollout.n=4.5", ["actor_rollout_ref.rollout.n=4.5", "whole number"]),
    ("critic.ppo_mini_batch_size=0", ["critic.ppo_mini_batch_size=0", "1 or more"]),
    ("critic.ppo_mini_batch_size=null", ["critic.ppo_mini_batch_size=None", "whole number"]),
    ("critic.ppo_epochs=0", ["critic.ppo_epochs=0", "1 or more"]),
    ("data.train_batch_size=0", ["data.train_batch_size=0", "1 or more"]),
    ("data.max_prompt_length=null", ["data.max_prompt_length=None", "1 or more"]),
    ("trainer.nnodes=0", ["trainer.nnodes=0", "1 or more"]),
    ("trainer.n_gpus_per_node=-1", ["trainer.n_gpus_per_node=-1", "1 or more"]),
    ("critic.fsdp.ulysses_sequence_parallel_size=0", ["ulysses_sequence_parallel_size=0", "1 or more"]),
    ("+critic.optim.grad_clip=0", ["critic.optim.grad_clip=0", "above 0"]),
    ("critic.optim.clip_grad=null", ["critic.optim.clip_grad=None", "above 0"]),
    ("actor_rollout_ref.actor.optim.clip_grad=-1", ["actor_rollout_ref.actor.optim.clip_grad=-1", "above 0"]),
    ("critic.optim.lr=null", ["critic.optim.lr=None", "number"]),
    ("algorithm.lam=null", ["algorithm.lam=None", "number"]),
    ("trainer.save_freq=null", ["trainer.save_freq=None", "number"]),
    ("trainer.total_training_steps=many", ["trainer.total_training_steps='many'", "number, or null"]),
    # sampling, which vLLM looks at with its first request
    ("actor_rollout_ref.rollout.temperature=-1", ["actor_rollout_ref.rollout.temperature=-1", "0 or more"]),
    ("actor_rollout_ref.rollout.temperature=inf", ["actor_rollout_ref.rollout.temperature=inf", "0 or more"]),
    ("actor_rollout_ref.rollout.top_p=0", ["actor_rollout_ref.rollout.top_p=0", "above 0"]),
    ("actor_rollout_ref.rollout.top_p=1.5", ["actor_rollout_ref.rollout.top_p=1.5", "at most 1"]),
    ("actor_rollout_ref.rollout.top_k=-2", ["actor_rollout_ref.rollout.top_k=-2", "-1 for all"]),
    ("actor_rollout_ref.rollout.val_kwargs.top_p=0", ["actor_rollout_ref.rollout.val_kwargs.top_p=0", "above 0"]),
    (
        "trainer.val_before_train=False trainer.test_freq=5 actor_rollout_ref.rollout.val_kwargs.temperature=-1",
        ["actor_rollout_ref.rollout.val_kwargs.temperature=-1", "0 or more"],
    ),
    # batches
    ("critic.use_dynamic_bsz=False", ["critic.ppo_micro_batch_size_per_gpu=None", "use_dynamic_bsz=True"]),
    (
        "critic.use_dynamic_bsz=False critic.ppo_micro_batch_size_per_gpu=-2",
        ["critic.ppo_micro_batch_size_per_gpu=-2", "1 or more"],
    ),
    (
        "+asyppo.num_critics=1 critic.use_dynamic_bsz=False critic.ppo_micro_batch_size_per_gpu=3",
        ["critic.ppo_micro_batch_size_per_gpu=3", "multiple of 3"],
    ),
    (
        "critic.use_dynamic_bsz=False critic.ppo_micro_batch_size_per_gpu=4 critic.forward_micro_batch_size_per_gpu=5",
        ["critic.forward_micro_batch_size_per_gpu=5", "divisor of 32"],
    ),
    ("critic.ppo_max_token_len_per_gpu=100", ["critic.ppo_max_token_len_per_gpu=100", "raise it to 1024"]),
    ("+critic.ppo_infer_max_token_len_per_gpu=10", ["critic.ppo_infer_max_token_len_per_gpu=10", "raise it to 1024"]),
    (
        "actor_rollout_ref.rollout.response_length=4096 critic.ppo_max_token_len_per_gpu=4096",
        ["critic.ppo_max_token_len_per_gpu=4096", "raise it to 4608"],
    ),
    (
        "data.max_prompt_length=16 data.max_response_length=16 critic.ppo_max_token_len_per_gpu=100",
        ["critic.ppo_max_token_len_per_gpu=100", "verl's padding rows", "raise it to 128"],
    ),
    (
        "data.max_prompt_length=16 data.max_response_length=16 data.train_batch_size=12 critic.ppo_max_token_len_per_gpu=200 "
        "critic.forward_max_token_len_per_gpu=64",
        ["critic.forward_max_token_len_per_gpu=64", "verl's padding rows", "raise it to 128"],
    ),
    ("actor_rollout_ref.rollout.response_length=null", ["rollout.response_length=None", "whole number"]),
    ("critic.ppo_mini_batch_size=7 trainer.n_gpus_per_node=8", ["critic.ppo_mini_batch_size=7", "multiple of 8"]),
    # what goes together with AsyPPO
    ("trainer.use_v1=False", ["trainer.use_v1=False", "V1 trainer"]),
    ("trainer.v1.trainer_mode=synch", ["trainer.v1.trainer_mode='synch'", "did you mean sync?"]),
    ("trainer.v1.trainer_mode=null", ["trainer.v1.trainer_mode='None'", "sync"]),
    ("critic.enable=False", ["critic.enable=False", "use grpo"]),
    (
        "critic=megatron_critic",
        ["critic._target_='verl.workers.config.McoreCriticConfig'", "take critic=dp_critic, without"],
    ),
    ("critic.strategy=megatron", ["critic.strategy='megatron'", "fsdp2"]),
    ("critic.strategy=null", ["critic.strategy=None", "fsdp2"]),
    ("distillation.enabled=True", ["distillation.enabled=True", "set it to False"]),
    ("algorithm.use_pf_ppo=True", ["algorithm.use_pf_ppo=True", "other responses; set it to False"]),
    ("critic.model.lora_rank=8", ["critic.model.lora_rank=8", "lora_rank=0"]),
    ("actor_rollout_ref.actor.policy_loss.loss_mode=dro", ["loss_mode='dro'", "another loss_mode"]),
    ("actor_rollout_ref.actor.policy_loss.loss_mode=gsppo", ["loss_mode='gsppo'", "did you mean gspo?"]),
    ("critic.loss_agg_mode=token-meen", ["critic.loss_agg_mode='token-meen'", "did you mean token-mean?"]),
    # GPUs
    ("+asyppo.placement=splits", ["asyppo.placement='splits'", "did you mean split?", "colocated, pool, split"]),
    ("+asyppo.pool=4", ["asyppo.pool=4", "{n_gpus_per_node: 4, nnodes: 1}"]),
    ("+asyppo.pool.gpus=4", ["asyppo.pool.gpus=4", "valid keys: n_gpus_per_node, nnodes"]),
    ("+asyppo.pool.n_gpus_per_node=-1", ["asyppo.pool.n_gpus_per_node=-1", "whole number"]),
    ("+asyppo.pool.nnodes=1.5", ["asyppo.pool.nnodes=1.5", "whole number"]),
    ("+asyppo.pool.n_gpus_per_node=4", ["asyppo.pool.n_gpus_per_node=4", "idle with asyppo.placement=colocated"]),
    (POOL, ["asyppo.placement=pool", "asyppo.pool.n_gpus_per_node=0", "set asyppo.pool.n_gpus_per_node=1 or more"]),
    (SPLIT, ["asyppo.placement=split", "set asyppo.pool.n_gpus_per_node=2 or a multiple"]),
    (f"{POOL} +asyppo.pool.n_gpus_per_node=2 +asyppo.pool.nnodes=0", ["asyppo.pool.nnodes=0", "asyppo.pool.nnodes=1"]),
    (f"{SPLIT} +asyppo.pool.n_gpus_per_node=3", ["the 3 GPUs", "asyppo.num_critics=2", "a multiple of 2"]),
    (f"{SPLIT} +asyppo.pool.n_gpus_per_node=1", ["the 1 GPUs", "a multiple of 2"]),
    (
        f"{POOL} +asyppo.pool.n_gpus_per_node=6",
        ["32 responses", "6 data-parallel ranks", "asyppo.pool.n_gpus_per_node=6", "multiple of 6"],
    ),
    (
        f"{SPLIT} +asyppo.pool.n_gpus_per_node=6",
        ["3 data-parallel ranks", "multiple of 3", "asyppo.num_critics=2"],
    ),
    ("critic.fsdp.ulysses_sequence_parallel_size=2", ["ulysses_sequence_parallel_size=2", "does not divide"]),
    (
        f"{SPLIT} +asyppo.pool.n_gpus_per_node=4 critic.fsdp.ulysses_sequence_parallel_size=4",
        ["ulysses_sequence_parallel_size=4", "the 2 GPUs that a critic has", "set one of 1 or 2"],
    ),
    (
        "critic.fsdp.ulysses_sequence_parallel_size=2 trainer.n_gpus_per_node=2 critic.model.use_remove_padding=True",
        ["ulysses_sequence_parallel_size=2", "attn_implementation='sdpa'", "remove one of the two"],
    ),
    (
        "critic.fsdp.ulysses_sequence_parallel_size=2 trainer.n_gpus_per_node=2 critic.model.use_remove_padding=True "
        "~critic.model.override_config +critic.model.override_config={_attn_implementation:sdpa}",
        ["ulysses_sequence_parallel_size=2", "override_config._attn_implementation='sdpa'"],
    ),
    (
        "critic.fsdp.ulysses_sequence_parallel_size=2 trainer.n_gpus_per_node=2 "
        "critic.model.override_config.attn_implementation=flash_attention_2",
        ["ulysses_sequence_parallel_size=2", "critic.model.use_remove_padding=True"],
    ),
    (
        f"{POOL} +asyppo.pool.n_gpus_per_node=4 critic.fsdp.fsdp_size=3",
        ["critic.fsdp.fsdp_size=3", "the 4 GPUs", "1, 2 or 4"],
    ),
    (
        f"{POOL} +asyppo.pool.n_gpus_per_node=4 {OWN}.fsdp.fsdp_size=3",
        ["asyppo.critic_overrides.1.fsdp.fsdp_size=3", "critic 1"],
    ),
    (
        "critic.strategy=fsdp critic.fsdp.fsdp_size=1 trainer.n_gpus_per_node=2",
        ["critic.fsdp.fsdp_size=1", "critic.strategy=fsdp", "never averaged", "critic.strategy=fsdp2"],
    ),
    (
        f"critic.strategy=fsdp {POOL} +asyppo.pool.n_gpus_per_node=2 {OWN}.fsdp.fsdp_size=1",
        ["asyppo.critic_overrides.1.fsdp.fsdp_size=1", "the 2 GPUs that critic 1 has"],
    ),
    (
        "actor_rollout_ref.actor.strategy=fsdp actor_rollout_ref.actor.fsdp_config.fsdp_size=1 trainer.n_gpus_per_node=2",
        ["actor_rollout_ref.actor.fsdp_config.fsdp_size=1", "set actor_rollout_ref.actor.strategy=fsdp2"],
    ),
    # models
    ("critic.model.path=null", ["critic.model", "verl cannot use"]),
    ("critic.model.path=/nowhere/critic", ["critic.model.path=/nowhere/critic", "verl cannot use"]),
    ("critic.model.path=TOY/critic/", ["critic.model.path=TOY/critic/", "verl cannot use"]),
    ("critic.model.tokenizer_path=/nowhere", ["critic.model", "/nowhere", "verl cannot use"]),
    ("critic.model.override_config=null", ["critic.model", "verl cannot use"]),
    ("actor_rollout_ref.model.path=/nowhere/actor", ["actor_rollout_ref.model.path=/nowhere/actor"]),
    ("actor_rollout_ref.model.hf_config_path=/nowhere", ["actor_rollout_ref.model", "verl cannot use"]),
    ("+critic.typo=1", ["critic: verl cannot use these settings", "'typo'"]),
    # checkpoints
    ("trainer.default_local_dir=3", ["trainer.default_local_dir=3", "folder for checkpoints"]),
    ("trainer.default_local_dir=null", ["trainer.default_local_dir=None", "folder for checkpoints"]),
    (
        "trainer.save_freq=1 trainer.default_local_dir=TOY/train.parquet/deep",
        ["train.parquet is a file", "name another folder"],
    ),
    (
        "actor_rollout_ref.actor.checkpoint.save_contents=[modle]",
        ["actor_rollout_ref.actor.checkpoint.save_contents[0]='modle'", "did you mean model?"],
    ),
    (
        "critic.checkpoint.load_contents=[model,optimiser]",
        ["critic.checkpoint.load_contents[1]='optimiser'", "did you mean optimizer?"],
    ),
    ("trainer.resume_mode=autto", ["trainer.resume_mode='autto'", "did you mean auto?"]),
    (STEPS, ["trainer.resume_from_path=None", "global_step_<n>"]),
    (f"{STEPS} trainer.resume_from_path=3", ["trainer.resume_from_path=3", "global_step_<n>"]),
    (
        f"{STEPS} trainer.resume_from_path=/nowhere/global_step_3",
        ["trainer.resume_from_path=/nowhere/global_step_3", "trainer.resume_mode=auto"],
    ),
]
