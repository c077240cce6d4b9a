"""Legal settings that are seldom used, found in verl's validators, defaults and examples: a run with them must not be refused.

Each is a line of overrides for a configuration that is accepted; TOY is the folder of the toy task.
"""

SEPARATE = (
    "trainer.v1.trainer_mode=separate_async trainer.v1.separate_async.parameter_sync_step=2 "
    "actor_rollout_ref.rollout.nnodes=1 actor_rollout_ref.rollout.n_gpus_per_node=1 "
    "actor_rollout_ref.rollout.checkpoint_engine.backend=nccl"
)

LEGAL = [
    # numbers
    "algorithm.gamma=1.01",
    "algorithm.rollout_correction.rollout_is_threshold=0.5_2.0",
    "actor_rollout_ref.actor.entropy_coeff=-0.01",
    "critic.cliprange_value=inf",
    "critic.cliprange_value=0",
    "critic.optim.clip_grad=inf",
    "critic.optim.clip_grad=null +critic.optim.grad_clip=0.5",
    "critic.optim.lr=0",
    "critic.optim.lr_warmup_steps=null",
    "critic.optim.weight_decay=0 critic.optim.betas=[0.9,0.95]",
    "critic.fsdp.reshard_after_forward=2",
    "critic.fsdp.fsdp_size=16",
    "+asyppo.compile_critics=True",
    "+asyppo.update_critics_first=True +asyppo.adaptive_lam=True",
    "trainer.total_training_steps=0",
    "trainer.total_training_steps=1e3",
    "trainer.total_epochs=1 trainer.total_training_steps=100000",
    "trainer.save_freq=-1 trainer.test_freq=0",
    "trainer.max_actor_ckpt_to_keep=0 trainer.max_critic_ckpt_to_keep=-1",
    "trainer.v1.sampler.max_off_policy_threshold=null",
    "data.gen_batch_size=8",
    "data.train_max_samples=16",
    "critic.ppo_max_token_len_per_gpu=1024",
    "data.max_response_length=40000 actor_rollout_ref.rollout.response_length=512",
    "data.max_prompt_length=16 data.max_response_length=16 critic.ppo_max_token_len_per_gpu=32 +asyppo.num_critics=1",
    "data.max_prompt_length=16 data.max_response_length=16 critic.ppo_max_token_len_per_gpu=128 "
    "critic.forward_max_token_len_per_gpu=32",
    "+asyppo.critic_overrides.1.fsdp.wrap_policy=null",
    "actor_rollout_ref.rollout.n=1 trainer.val_only=True",
    "actor_rollout_ref.rollout.n=1 +asyppo.shard=prompt",
    "actor_rollout_ref.rollout.n=5 critic.ppo_mini_batch_size=8",
    # switches
    "critic.shuffle=null",
    "critic.shuffle=yes",
    "trainer.val_before_train=True actor_rollout_ref.rollout.val_kwargs.do_sample=True "
    "actor_rollout_ref.rollout.val_kwargs.temperature=0.6 actor_rollout_ref.rollout.val_kwargs.top_p=0.95",
    "trainer.val_before_train=False actor_rollout_ref.rollout.val_kwargs.top_p=0",
    "actor_rollout_ref.rollout.temperature=0",
    "actor_rollout_ref.rollout.temperature=2.5 actor_rollout_ref.rollout.top_k=0 actor_rollout_ref.rollout.top_p=0.01",
    # what verl fills in
    "critic.profiler=null",
    "critic.checkpoint=null",
    "critic.checkpoint.save_contents=null critic.checkpoint.load_contents=null trainer.save_freq=1",
    "trainer.logger=console",
    # checkpoints
    "trainer.save_freq=1 actor_rollout_ref.actor.checkpoint.save_contents=[hf_model] critic.checkpoint.save_contents=[hf_model]",
    "trainer.save_freq=1 critic.checkpoint.save_contents=[]",
    "trainer.save_freq=1 critic.checkpoint.save_contents=[model] critic.checkpoint.load_contents=[model,optimizer,extra]",
    "trainer.save_freq=1 actor_rollout_ref.actor.checkpoint.save_contents=[model,hf_model,optimizer,extra]",
    "+trainer.remove_previous_ckpt_in_save=True",
    "trainer.default_local_dir=TOY/train.parquet",
    "trainer.resume_from_path=/nowhere/global_step_3",
    "trainer.resume_mode=disable trainer.resume_from_path=/nowhere/global_step_3",
    # trainers and losses
    "trainer.v1.trainer_mode=colocate_async",
    SEPARATE,
    f"{SEPARATE} actor_rollout_ref.hybrid_engine=False",
    "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum-norm actor_rollout_ref.actor.loss_scale_factor=100",
    "actor_rollout_ref.actor.policy_loss.loss_mode=gspo",
    "actor_rollout_ref.actor.policy_loss.loss_mode=dro actor_rollout_ref.actor.policy_loss.dro_beta=0.1 "
    "+asyppo.adv_mask_fraction=0",
    "actor_rollout_ref.actor.policy_loss.loss_mode=mine actor_rollout_ref.model.external_lib=json",
    "algorithm.use_kl_in_reward=True actor_rollout_ref.actor.use_kl_loss=True",
    "actor_rollout_ref.actor.use_dynamic_bsz=False actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4 "
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4 actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=4 "
    "critic.ppo_micro_batch_size_per_gpu=4",
    "critic.use_dynamic_bsz=False critic.ppo_micro_batch_size_per_gpu=2 critic.forward_micro_batch_size_per_gpu=null",
    "actor_rollout_ref.model.lora_rank=8",
    # GPUs
    "critic.fsdp.fsdp_size=1 trainer.n_gpus_per_node=2",
    "critic.strategy=fsdp critic.fsdp.fsdp_size=1",
    "critic.strategy=fsdp critic.fsdp.fsdp_size=2 trainer.n_gpus_per_node=4",
    "critic.strategy=fsdp critic.fsdp.fsdp_size=1 trainer.n_gpus_per_node=2 +asyppo.placement=pool "
    "+asyppo.pool.n_gpus_per_node=1",
    "ray_kwargs.ray_init.num_cpus=2 +ray_kwargs.ray_init.address=ray://somewhere:10001",
    "ray_kwargs.ray_init.num_cpus=5 transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
    # several nodes: files and disks need not be here
    "trainer.nnodes=2 trainer.save_freq=1 trainer.default_local_dir=TOY/train.parquet/elsewhere",
    "trainer.nnodes=2 reward.custom_reward_function.path=/elsewhere/reward.py",
    "trainer.nnodes=2 data.train_files=/elsewhere/train.parquet",
    "trainer.nnodes=2 trainer.resume_mode=resume_path trainer.resume_from_path=/elsewhere/global_step_3",
    # data that only verl reads
    "data.train_files=hdfs://somewhere/train.parquet",
    "data.train_files=[/elsewhere/train.json,/elsewhere/more.jsonl]",
    "data.val_files=TOY/made.json trainer.val_before_train=False",
    "trainer.v1.sampler.custom_sampler.path=/nowhere.py",
    # critics of their own
    "+asyppo.critic_overrides.1.optim.lr=0.5 +asyppo.critic_overrides.1.optim.lr_scheduler_type=cosine "
    "+asyppo.critic_overrides.1.fsdp.param_offload=True",
    "+asyppo.critic_overrides.0.model.path=TOY/actor +asyppo.critic_overrides.1.model.path=TOY/critic",
    "+asyppo.critic_overrides.0={} +asyppo.num_critics=4",
    "+asyppo.num_critics=1",
    "+asyppo.shard=none +asyppo.num_critics=8",
    # names that are like the method's, and another's
    "+appo.beta=1",
    "+asyppo_notes=mine",
]

ESTIMATORS = ("appo", "sppo", "aspo", "async_ppo", "asyppo_two", "aysppo", "gae", "grpo", "rloo", "reinforce_plus_plus")
"""Estimators of verl or of somebody, which are none of AsyPPO's business."""
