#!/usr/bin/env bash
# Evaluate a model on benchmarks through verl's own validation: avg@k, pass@k and maj@k with bootstrap intervals.
#
#   Hardware  GPUs that hold the actor; with VERL_PLATFORM=cpu two cores and a small model
#   Time      about a minute for the start, then sampling; the paper's six benchmarks are about 1,550 problems
#   Expect    results.md, results.json, samples.jsonl in RUN_DIR/evaluation/global_step_N, the table on the terminal
#
# Usage: bash scripts/evaluate.sh CHECKPOINT_OR_MODEL [any verl override]
#   CHECKPOINT_OR_MODEL   a run folder (its latest checkpoint), a checkpoint (.../global_step_N), or a Hugging Face model
#   DATA_DIR=...          prepared data (default data/asyppo); all of DATA_DIR/eval/*.parquet are used
#   VAL_FILES=a,b         these files instead
#   REWARD=...            file with compute_score (default recipe/asyppo/reward/math_reward.py)
#   K=4 TEMPERATURE=0.6 TOP_P=0.95 MAX_PROMPT=1024 MAX_RESPONSE=8192   sampling
#   NNODES=1 N_GPUS=8 ROLLOUT_TP=1 GPU_MEMORY_UTILIZATION=0.6          hardware
#   OUT=...               where to write; on several nodes on storage that all of them see
#   VERBOSE=1             show the complete log
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
TARGET=${1:?usage: bash scripts/evaluate.sh CHECKPOINT_OR_MODEL [any verl override]}
shift
# Relative names are those of the caller.
if [ -e "$TARGET" ]; then TARGET=$(realpath "$TARGET"); fi
DATA_DIR=$(realpath -m "${DATA_DIR:-$ROOT/data/asyppo}")
VAL_FILES=${VAL_FILES:-$(printf '%s,' "$DATA_DIR"/eval/*.parquet)}
VAL_FILES=$(tr ',' '\n' <<< "${VAL_FILES%,}" | xargs -d '\n' realpath -m | paste -sd,)
REWARD=$(realpath -m "${REWARD:-$ROOT/recipe/asyppo/reward/math_reward.py}")
OUT=${OUT:+$(realpath -m "$OUT")}
cd "$ROOT"
source recipe/asyppo/python.sh
CPU=()
if [ "${VERL_PLATFORM:-}" = cpu ]; then
    RANKS=${N_GPUS:-1}
    N_GPUS=$RANKS
    source recipe/asyppo/cpu.sh
fi
NNODES=${NNODES:-1}
N_GPUS=${N_GPUS:-8}

DATA=(
    data.val_files="[$VAL_FILES]"
    data.train_files="[$VAL_FILES]" # verl opens it, nothing is trained
    data.train_batch_size=$((NNODES * N_GPUS))
    data.train_max_samples=$((NNODES * N_GPUS))
    data.shuffle=False # and data.val_max_samples takes the first problems, not others every time
    data.max_prompt_length="${MAX_PROMPT:-1024}"
    data.max_response_length="${MAX_RESPONSE:-8192}"
    data.filter_overlong_prompts=True
    data.custom_cls.path="$ROOT/recipe/asyppo/evaluation/whole_prompts.py"
    data.custom_cls.name=WholePrompts
    data.validation_shuffle=False
    reward.custom_reward_function.path="$REWARD"
    reward.reward_manager.source=importlib
    reward.reward_manager.name=LabelledRewardManager
    reward.reward_manager.module.path="$ROOT/recipe/asyppo/evaluation/labelled_reward.py"
)
ACTOR=(
    actor_rollout_ref.actor.strategy=fsdp2
    actor_rollout_ref.actor.use_dynamic_bsz=True
    actor_rollout_ref.actor.ppo_mini_batch_size=$((NNODES * N_GPUS))
    actor_rollout_ref.actor.fsdp_config.param_offload=True
)
ROLLOUT=(
    actor_rollout_ref.rollout.name=vllm
    actor_rollout_ref.rollout.tensor_model_parallel_size="${ROLLOUT_TP:-1}"
    actor_rollout_ref.rollout.gpu_memory_utilization="${GPU_MEMORY_UTILIZATION:-0.6}"
    actor_rollout_ref.rollout.val_kwargs.n="${K:-4}"
    actor_rollout_ref.rollout.val_kwargs.do_sample=True
    actor_rollout_ref.rollout.val_kwargs.temperature="${TEMPERATURE:-0.6}"
    actor_rollout_ref.rollout.val_kwargs.top_p="${TOP_P:-0.95}"
)
TRAINER=(
    algorithm.adv_estimator=grpo
    critic.enable=False
    trainer.val_only=True
    trainer.val_before_train=True
    trainer.resume_mode=disable
    trainer.total_training_steps=1
    trainer.logger="[console]"
    trainer.nnodes="$NNODES"
    trainer.n_gpus_per_node="$N_GPUS"
    transfer_queue.backend.SimpleStorage.total_storage_size=null # by default 100,000 responses, all benchmarks together
    transfer_queue.backend.SimpleStorage.num_data_storage_units=$((NNODES * N_GPUS)) # each a logical CPU of Ray's
)

exec "$PYTHON" -m recipe.asyppo.evaluation.evaluate ${OUT:+--out "$OUT"} ${VERBOSE:+--verbose} "$TARGET" \
    "${DATA[@]}" "${ACTOR[@]}" "${ROLLOUT[@]}" "${TRAINER[@]}" ${CPU[@]+"${CPU[@]}"} "$@"
