#!/usr/bin/env bash
# The Qwen3 recipe: AsyPPO and its three baselines, everything else equal. Started by scripts/run_asyppo_qwen3_*.sh, which
# set the sizes; to run it for other models, set ACTOR_MODEL and CRITIC_MODEL yourself. The settings and their sources are
# a table in recipe/asyppo/README.md.
#
#   ALGO=asyppo            PPO with NUM_CRITICS mini-critics (the default)
#   ALGO=ppo               symmetric PPO: one critic of the actor's size
#   ALGO=ppo_small_critic  naive asymmetric PPO: one critic of a mini-critic's size
#   ALGO=grpo              no critic
#
# TRAIN_FILES, VAL_FILES (a,b) and REWARD: problems and reward of your own (docs/running.md#data).
# FAST_START=1, for short runs on one node: Ray's workers are forked from one process that has imported torch and vLLM.
#
# Usage: ALGO=... NNODES=... N_GPUS=... bash scripts/run_asyppo_qwen3_4b.sh [any verl override]
# With VERL_PLATFORM=cpu the same file trains small models on a CPU.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
NAME=${NAME:-qwen3}
ALGO=${ALGO:-asyppo}
RUN_DIR=$(realpath -m "${RUN_DIR:-$ROOT/runs/${NAME}_$ALGO}") # on several nodes: on storage that all of them see
DATA_DIR=$(realpath -m "${DATA_DIR:-$ROOT/data/asyppo}")      # written by python -m recipe.asyppo.data.prepare_data
# Relative names are those of the caller; what is no file here may be a name on the hub.
for variable in TRAIN_FILES VAL_FILES REWARD ACTOR_MODEL CRITIC_MODEL; do
    IFS=, read -ra names <<< "${!variable:-}"
    for i in "${!names[@]}"; do
        if [ -e "${names[i]}" ]; then names[i]=$(realpath -s "${names[i]}"); fi
    done
    printf -v "$variable" %s "$(IFS=, && printf %s "${names[*]}")"
done
cd "$ROOT"

case ${GPU_GB:-80} in
    80 | 141) ;; # the sizes' scripts have plans for these
    *)
        echo "GPU_GB=$GPU_GB has no memory plan; set 80 or 141, and adapt with the variables of recipe/asyppo/run_qwen3.sh" >&2
        exit 2
        ;;
esac

NNODES=${NNODES:-1}
N_GPUS=${N_GPUS:-8}
# On several nodes a critic is sharded inside a node and replicated across them: it is small, and links are slower.
CRITIC_FSDP_SIZE=${CRITIC_FSDP_SIZE:-$([ "$NNODES" -gt 1 ] && [ "$N_GPUS" -gt 1 ] && echo "$N_GPUS" || echo -1)}
PROMPTS=${PROMPTS:-32} # 32 prompts x 32 responses = 1024
N=${N:-32}
MAX_PROMPT=${MAX_PROMPT:-1024}
MAX_RESPONSE=${MAX_RESPONSE:-8192}
# Both decide on vLLM's limit below, which would cut longer sequences in silence.
for override in "$@"; do
    if [[ $override =~ ^\+*data\.max_(prompt|response)_length=([0-9]+)$ ]]; then
        printf -v "MAX_${BASH_REMATCH[1]^^}" %s "${BASH_REMATCH[2]}"
    fi
done
ACTOR_MODEL=${ACTOR_MODEL:?the actor: a folder or hub repository in Hugging Face format}
CRITIC_MODEL=${CRITIC_MODEL:?the mini-critics: a folder or hub repository in Hugging Face format}
TRAIN_FILES=${TRAIN_FILES:-$DATA_DIR/train/deepmath.parquet}
VAL_FILES=${VAL_FILES:-$(printf '%s,' "$DATA_DIR"/eval/*.parquet)}
REWARD=${REWARD:-$ROOT/recipe/asyppo/reward/math_reward.py}
# They stand in overrides without quotes, where some characters have a meaning of their own.
for variable in RUN_DIR DATA_DIR TRAIN_FILES VAL_FILES REWARD ACTOR_MODEL CRITIC_MODEL; do
    value=${!variable}
    if [[ $variable == *_FILES ]]; then value=${value//,/}; fi # a comma stands between files
    refused=$(printf %s "$value" | LC_ALL=C tr -d 'A-Za-z0-9_/.+%*@?|: -')
    if [ -n "$refused" ]; then
        echo "$variable=${!variable}: hydra does not take these characters in a name: $refused; choose a name without them" >&2
        exit 2
    fi
done
LOGGER=${LOGGER:-console,file} # add wandb, tensorboard, ...

source recipe/asyppo/python.sh
CPU=()
if [ "${VERL_PLATFORM:-}" = cpu ]; then
    RANKS=$N_GPUS
    source recipe/asyppo/cpu.sh
elif [ -n "${FAST_START:-}" ]; then
    if [ -n "${RAY_ADDRESS:-}" ] || [ "$NNODES" -gt 1 ]; then
        echo "FAST_START=1 is for a run that starts its own Ray on one node: unset it, or unset RAY_ADDRESS and set NNODES=1" >&2
        exit 2
    fi
    export ASYPPO_PRIVATE_TMPDIR=1
    # What torch compiles stays where it always does, for the next run.
    export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-${TMPDIR:-/tmp}/torchinductor_$(id -un 2> /dev/null || id -u)}
fi

CRITIC_TOKENS=${CRITIC_TOKENS:-36864}
# verl's V1 trainer has one budget for its critic, under this name and no other.
GAE=(algorithm.adv_estimator=gae +critic.ppo_infer_max_token_len_per_gpu="$CRITIC_TOKENS")
case $ALGO in
    asyppo)
        # Compiled critics were tried with whole sequences only.
        if [ "${CRITIC_SP:-1}" -gt 1 ]; then COMPILE_CRITICS=${COMPILE_CRITICS:-False}; fi
        ALGORITHM=(
            algorithm.adv_estimator=asyppo
            +asyppo.num_critics="${NUM_CRITICS:-2}"
            +asyppo.compile_critics="${COMPILE_CRITICS:-True}"
        )
        # Attention that is compiled with the rest. Sequence parallelism knows flash-attn only; on a CPU cpu.sh chooses.
        if [ "${CRITIC_SP:-1}${VERL_PLATFORM:-}" = 1 ]; then
            ALGORITHM+=(+critic.model.override_config.attn_implementation=torch_packed)
        fi
        ;;
    ppo) ALGORITHM=("${GAE[@]}") CRITIC_MODEL=$ACTOR_MODEL ;;
    ppo_small_critic) ALGORITHM=("${GAE[@]}") ;;
    grpo) ALGORITHM=(algorithm.adv_estimator=grpo critic.enable=False) ;;
    *)
        echo "ALGO=$ALGO is unknown; set asyppo, ppo, ppo_small_critic or grpo" >&2
        exit 2
        ;;
esac

DATA=(
    data.train_files="[$TRAIN_FILES]"
    data.val_files="[${VAL_FILES%,}]"
    data.train_batch_size="$PROMPTS"
    data.max_prompt_length="$MAX_PROMPT"
    data.max_response_length="$MAX_RESPONSE"
    data.filter_overlong_prompts=True
    data.truncation=error
    reward.custom_reward_function.path="$REWARD"
)
MODEL=(
    actor_rollout_ref.model.path="$ACTOR_MODEL"
    actor_rollout_ref.model.use_remove_padding=True
    actor_rollout_ref.model.enable_gradient_checkpointing=True
)
ACTOR=(
    actor_rollout_ref.actor.strategy=fsdp2
    actor_rollout_ref.actor.optim.lr="${ACTOR_LR:-1e-6}"
    # "UTD 4": four passes over the batch, one optimizer step each.
    actor_rollout_ref.actor.ppo_mini_batch_size="$PROMPTS"
    actor_rollout_ref.actor.ppo_epochs=4
    actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean
    actor_rollout_ref.actor.clip_ratio=0.2
    actor_rollout_ref.actor.use_kl_loss=False
    actor_rollout_ref.actor.entropy_coeff=0.001
    actor_rollout_ref.actor.use_dynamic_bsz=True
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu="${ACTOR_TOKENS:-18432}"
    actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size="${ACTOR_SP:-1}"
    actor_rollout_ref.actor.fsdp_config.param_offload="${ACTOR_OFFLOAD:-False}"
    actor_rollout_ref.actor.fsdp_config.optimizer_offload="${ACTOR_OFFLOAD:-False}"
)
ROLLOUT=(
    actor_rollout_ref.rollout.name=vllm
    actor_rollout_ref.rollout.n="$N"
    actor_rollout_ref.rollout.temperature=1.0
    # vLLM starts only if its cache holds a sequence of this length; by default that is the model's, of 32,768 and more.
    actor_rollout_ref.rollout.max_model_len=$((MAX_PROMPT + MAX_RESPONSE))
    actor_rollout_ref.rollout.tensor_model_parallel_size="${ROLLOUT_TP:-1}"
    actor_rollout_ref.rollout.gpu_memory_utilization="${GPU_MEMORY_UTILIZATION:-0.6}"
    actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu="${LOG_PROB_TOKENS:-36864}"
    # Logs how far the rollout's probabilities are from the trainer's.
    actor_rollout_ref.rollout.calculate_log_probs=True
    actor_rollout_ref.rollout.val_kwargs.n=4
    actor_rollout_ref.rollout.val_kwargs.do_sample=True
    actor_rollout_ref.rollout.val_kwargs.temperature=0.6
    actor_rollout_ref.rollout.val_kwargs.top_p=0.95
)
CRITIC=(
    critic.strategy=fsdp2
    critic.model.path="$CRITIC_MODEL"
    critic.model.use_remove_padding=True
    critic.model.enable_gradient_checkpointing=True
    critic.optim.lr="${CRITIC_LR:-5e-6}"
    critic.use_dynamic_bsz=True
    critic.ppo_max_token_len_per_gpu="$CRITIC_TOKENS"
    critic.forward_max_token_len_per_gpu="$CRITIC_TOKENS"
    critic.fsdp.fsdp_size="$CRITIC_FSDP_SIZE"
    critic.fsdp.ulysses_sequence_parallel_size="${CRITIC_SP:-1}"
    critic.fsdp.param_offload="${CRITIC_OFFLOAD:-False}"
    critic.fsdp.optimizer_offload="${CRITIC_OFFLOAD:-False}"
)
ALGORITHM+=(
    algorithm.gamma=1.0
    algorithm.lam=1.0
    algorithm.use_kl_in_reward=False
)
TRAINER=(
    trainer.nnodes="$NNODES"
    trainer.n_gpus_per_node="$N_GPUS"
    # 5,000 problems at 32 a step: two passes over the data.
    trainer.total_training_steps="${STEPS:-312}"
    trainer.save_freq="${SAVE_FREQ:-25}"
    trainer.test_freq="${TEST_FREQ:-25}"
    trainer.val_before_train="${VAL_BEFORE_TRAIN:-True}"
    trainer.logger="[$LOGGER]"
    trainer.project_name=asyppo_qwen3
    trainer.experiment_name="$(basename "$RUN_DIR")"
    trainer.default_local_dir="$RUN_DIR/checkpoints"
    trainer.max_actor_ckpt_to_keep=2
    trainer.max_critic_ckpt_to_keep=2
    hydra.run.dir="$RUN_DIR/hydra"
    # The trainer may run on another node of a Ray cluster that knows nothing of this shell's variables.
    +ray_kwargs.ray_init.runtime_env.env_vars.VERL_FILE_LOGGER_PATH="$RUN_DIR/metrics.jsonl"
)

exec "$PYTHON" -m recipe.asyppo.console "$RUN_DIR" ${VERBOSE:+--verbose} -- \
    "$PYTHON" -m verl.trainer.main_ppo "${DATA[@]}" "${MODEL[@]}" "${ACTOR[@]}" "${ROLLOUT[@]}" "${CRITIC[@]}" \
    "${ALGORITHM[@]}" "${TRAINER[@]}" ${CPU[@]+"${CPU[@]}"} "$@"
