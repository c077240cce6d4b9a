#!/usr/bin/env bash
# Train AsyPPO end to end on a CPU: real verl, Ray, FSDP2 and vLLM, a small Qwen3 actor and two mini-critics that learn
# two-digit addition. Everything is made here; only Python packages are downloaded.
#
#   Hardware  two cores, 10 GB of memory, no GPU, Linux
#   Time      installation two minutes, toy task one minute (both once), training six to eight minutes
#   Expect    reward from about 0.4 to 0.65 (share of exact answers)
#
# Usage: bash scripts/run_asyppo_cpu.sh [any verl override], for example trainer.total_training_steps=4
#   RUN_DIR=...   where metrics.jsonl, checkpoints/ and log go (default runs/asyppo_cpu); an unfinished run is resumed
#   TOY_DIR=...   where the toy task is kept (default .cache/asyppo_cpu)
#   RANKS=2       data-parallel ranks
#   MAIN=...      module to run (default verl.trainer.main_ppo; recipe.asyppo.main_asyppo is the explicit form)
#   VERBOSE=1     show the whole log, not only the progress
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
RUN_DIR=$(realpath -m "${RUN_DIR:-$ROOT/runs/asyppo_cpu}")
TOY_DIR=$(realpath -m "${TOY_DIR:-$ROOT/.cache/asyppo_cpu}")
cd "$ROOT"
bash scripts/install.sh
PYTHON=$ROOT/.venv/bin/python
RANKS=${RANKS:-1}
MAIN=${MAIN:-verl.trainer.main_ppo}
STEPS=45

export VERL_PLATFORM=cpu
export VLLM_CPU_KVCACHE_SPACE=1
export PYTHONPATH=$ROOT/asyppo_verl/cpu/startup${PYTHONPATH:+:$PYTHONPATH}
[ -f "$TOY_DIR/made.json" ] || "$PYTHON" -m recipe.asyppo.make_toy "$TOY_DIR"

DATA=(
    data.train_files="$TOY_DIR/train.parquet"
    data.val_files="$TOY_DIR/test.parquet"
    data.train_batch_size=32
    data.max_prompt_length=16
    data.max_response_length=4
    data.dataloader_num_workers=0
    reward.num_workers=1
    reward.custom_reward_function.path="$ROOT/recipe/asyppo/toy_reward.py"
)
FP32="{param_dtype: fp32, reduce_dtype: fp32, buffer_dtype: fp32}"
ACTOR=(
    actor_rollout_ref.model.path="$TOY_DIR/actor"
    actor_rollout_ref.model.use_remove_padding=False
    actor_rollout_ref.model.enable_gradient_checkpointing=False
    +actor_rollout_ref.model.override_config.attn_implementation=sdpa
    actor_rollout_ref.actor.strategy=fsdp2
    "+actor_rollout_ref.actor.fsdp_config.mixed_precision=$FP32"
    actor_rollout_ref.actor.use_torch_compile=False
    actor_rollout_ref.actor.fsdp_config.use_torch_compile=False
    actor_rollout_ref.actor.ppo_mini_batch_size=16
    actor_rollout_ref.actor.use_dynamic_bsz=True
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=4096
    actor_rollout_ref.actor.optim.lr=2e-4
    actor_rollout_ref.actor.entropy_coeff=0.001
    actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean
)
ROLLOUT=(
    actor_rollout_ref.rollout.name=vllm
    actor_rollout_ref.rollout.n=8
    actor_rollout_ref.rollout.tensor_model_parallel_size=1
    actor_rollout_ref.rollout.dtype=float32
    actor_rollout_ref.rollout.enforce_eager=True
    actor_rollout_ref.rollout.free_cache_engine=False
    +actor_rollout_ref.rollout.enable_sleep_mode=False
    actor_rollout_ref.rollout.agent.num_workers=1
    actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes=64
    # vLLM's engine and its only worker in one process: one start of Python less.
    +actor_rollout_ref.rollout.engine_kwargs.vllm.distributed_executor_backend=vllm.v1.executor.uniproc_executor.UniProcExecutor
)
CRITIC=(
    critic.strategy=fsdp2
    critic.model.path="$TOY_DIR/critic"
    critic.model.use_remove_padding=False
    critic.model.enable_gradient_checkpointing=False
    +critic.model.override_config.attn_implementation=sdpa
    "+critic.fsdp.mixed_precision=$FP32"
    critic.ppo_max_token_len_per_gpu=4096
    critic.optim.lr=1e-3
)
ALGO=(
    algorithm.adv_estimator=asyppo
)
TRAINER=(
    trainer.device=cpu
    trainer.nnodes=1
    trainer.n_gpus_per_node="$RANKS"
    trainer.total_training_steps=$STEPS
    trainer.logger="[console,file]"
    trainer.project_name=asyppo_cpu
    trainer.experiment_name="$(basename "$RUN_DIR")"
    trainer.default_local_dir="$RUN_DIR/checkpoints"
    trainer.save_freq=15
    trainer.max_actor_ckpt_to_keep=1
    trainer.max_critic_ckpt_to_keep=1
    trainer.val_before_train=False
    trainer.test_freq=-1
    hydra.run.dir="$RUN_DIR/hydra"
    trainer.v1.sampler.custom_sampler.path=pkg://asyppo_verl.cpu.sampler
    trainer.v1.sampler.custom_sampler.name=QuickReplayBuffer
)
# Ray counts the ranks in logical GPUs and needs about a dozen logical CPUs for verl's helper actors.
RAY_DIR=$(mktemp -d -t asyppo-ray-XXXXXX)
trap 'rm -rf "$RAY_DIR"' EXIT
RAY=(
    +ray_kwargs.ray_init.address=local
    +ray_kwargs.ray_init._temp_dir="$RAY_DIR"
    +ray_kwargs.ray_init.include_dashboard=False
    +ray_kwargs.ray_init.num_gpus="$RANKS"
    ray_kwargs.ray_init.num_cpus=32
    transfer_queue.backend.SimpleStorage.num_data_storage_units=1
)

"$PYTHON" -m recipe.asyppo.console "$RUN_DIR" ${VERBOSE:+--verbose} -- \
    "$PYTHON" -m "$MAIN" \
    "${DATA[@]}" "${ACTOR[@]}" "${ROLLOUT[@]}" "${CRITIC[@]}" "${ALGO[@]}" "${TRAINER[@]}" "${RAY[@]}" "$@"
