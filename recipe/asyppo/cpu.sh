# What a verl run on a CPU needs, whatever it trains; to be sourced by a script that was started with VERL_PLATFORM=cpu
# and has set ROOT. Defines the array CPU, overrides for verl's command line.
#   RANKS        data-parallel ranks of the actor (default 1)
#   RAY_ADDRESS  an existing Ray cluster, whose nodes were started in this environment; default: a private one
RANKS=${RANKS:-1}
export VERL_PLATFORM=cpu
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive} # threads that spin while they wait take the cores from other processes
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}

FP32="{param_dtype: fp32, reduce_dtype: fp32, buffer_dtype: fp32}"
CPU=(
    data.dataloader_num_workers=0
    reward.num_workers=1
    actor_rollout_ref.model.use_remove_padding=False
    actor_rollout_ref.model.enable_gradient_checkpointing=False
    +actor_rollout_ref.model.override_config.attn_implementation=sdpa
    actor_rollout_ref.actor.strategy=fsdp2
    "+actor_rollout_ref.actor.fsdp_config.mixed_precision=$FP32"
    actor_rollout_ref.actor.use_torch_compile=False
    actor_rollout_ref.actor.fsdp_config.use_torch_compile=False
    actor_rollout_ref.rollout.dtype=float32
    actor_rollout_ref.rollout.enforce_eager=True
    actor_rollout_ref.rollout.free_cache_engine=False
    +actor_rollout_ref.rollout.enable_sleep_mode=False
    actor_rollout_ref.rollout.tensor_model_parallel_size=1
    actor_rollout_ref.rollout.agent.num_workers=1
    actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes=64
    # vLLM's engine and its only worker in one process: one start of Python less.
    +actor_rollout_ref.rollout.engine_kwargs.vllm.distributed_executor_backend=vllm.v1.executor.uniproc_executor.UniProcExecutor
    critic.strategy=fsdp2
    critic.model.use_remove_padding=False
    critic.model.enable_gradient_checkpointing=False
    +critic.model.override_config.attn_implementation=sdpa
    "+critic.fsdp.mixed_precision=$FP32"
    trainer.device=cpu
    trainer.v1.sampler.custom_sampler.path=pkg://asyppo_verl.cpu.sampler
    trainer.v1.sampler.custom_sampler.name=QuickReplayBuffer
    transfer_queue.backend.SimpleStorage.num_data_storage_units=1
)
if [ -z "${RAY_ADDRESS:-}" ]; then
    # Ray would keep records of 100,000 past calls for its dashboard, which is not started: a MiB a step.
    export RAY_task_events_report_interval_ms=0
    # vLLM and verl leave lock files behind in the temporary folder: recipe.asyppo.console gives the run one of its own,
    # and forks Ray's workers from a process that has imported torch and vLLM.
    export ASYPPO_PRIVATE_TMPDIR=1
    # Ray counts ranks in logical GPUs, of which it may believe in any number, and needs about a dozen logical CPUs for verl's helper actors.
    CPU+=(
        +ray_kwargs.ray_init.address=local
        +ray_kwargs.ray_init.include_dashboard=False
        +ray_kwargs.ray_init.num_gpus=64
        ray_kwargs.ray_init.num_cpus=32
    )
fi
