#!/usr/bin/env bash
# Train AsyPPO end to end on a CPU: real verl, Ray, FSDP2 and vLLM, a small Qwen3 actor that learns to spell numbers,
# "407=" -> "four zero seven", and two mini-critics an eighth of its size. Everything is made here; only Python packages
# are downloaded. Each critic has seen 12,288 graded answers of the starting actor (recipe/asyppo/toy/make_spelling.py).
#
#   Hardware  two cores, 10 GB of memory, no GPU, Linux
#   Time      installation three minutes, models and data one to three (both once), training five to seven minutes
#   Expect    reward from about 0.3 to 0.5 (share of exact answers), explained variance of the critics above 0.3,
#             |advantage| of masked tokens below 0.9 of the kept tokens'
#
# Usage: bash scripts/run_asyppo_cpu.sh [any verl override], for example trainer.total_training_steps=4
#   RUN_DIR=...   where metrics.jsonl, checkpoints/ and log go (default runs/asyppo_cpu); an unfinished run is resumed
#   TOY_DIR=...   where the task is kept (default .cache/spelling)
#   RANKS=2       data-parallel ranks
#   MAIN=...      module to run (default verl.trainer.main_ppo; recipe.asyppo.main_asyppo is the explicit form)
#   VERBOSE=1     show the whole log, not only the progress
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
RUN_DIR=$(realpath -m "${RUN_DIR:-$ROOT/runs/asyppo_cpu}")
TOY_DIR=$(realpath -m "${TOY_DIR:-$ROOT/.cache/spelling}")
cd "$ROOT"
bash scripts/install.sh
PYTHON=${PYTHON:-$ROOT/.venv/bin/python}
MAIN=${MAIN:-verl.trainer.main_ppo}
STEPS=30
source recipe/asyppo/cpu.sh
[ -f "$TOY_DIR/made.json" ] || "$PYTHON" -m recipe.asyppo.toy.make_spelling "$TOY_DIR"

DATA=(
    data.train_files="$TOY_DIR/train.parquet"
    data.val_files="$TOY_DIR/test.parquet"
    data.train_batch_size=32
    data.max_prompt_length=16
    data.max_response_length=20
    reward.custom_reward_function.path="$ROOT/recipe/asyppo/toy/toy_reward.py"
)
ACTOR=(
    actor_rollout_ref.model.path="$TOY_DIR/actor"
    actor_rollout_ref.actor.ppo_mini_batch_size=16
    actor_rollout_ref.actor.use_dynamic_bsz=True
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=4096
    actor_rollout_ref.actor.optim.lr=1.5e-5
    actor_rollout_ref.actor.entropy_coeff=0.001
    actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean
)
ROLLOUT=(
    actor_rollout_ref.rollout.name=vllm
    actor_rollout_ref.rollout.n=8
)
CRITIC=(
    critic.model.path="$TOY_DIR/critic"
    critic.ppo_max_token_len_per_gpu=4096
    critic.optim.lr=2e-4
)
# The other critic's own folder.
[[ ! -d $TOY_DIR/critic_1 || $* == *asyppo.num_critics=1* ]] ||
    CRITIC+=("+asyppo.critic_overrides.1.model.path=$TOY_DIR/critic_1")
ALGO=(
    algorithm.adv_estimator=asyppo
)
TRAINER=(
    trainer.nnodes=1
    trainer.n_gpus_per_node="$RANKS"
    trainer.total_training_steps=$STEPS
    trainer.logger="[console,file]"
    trainer.project_name=asyppo_cpu
    trainer.experiment_name="$(basename "$RUN_DIR")"
    trainer.default_local_dir="$RUN_DIR/checkpoints"
    trainer.save_freq=10
    trainer.max_actor_ckpt_to_keep=1
    trainer.max_critic_ckpt_to_keep=1
    trainer.val_before_train=False
    trainer.test_freq=-1
    hydra.run.dir="$RUN_DIR/hydra"
)

exec "$PYTHON" -m recipe.asyppo.console "$RUN_DIR" ${VERBOSE:+--verbose} -- \
    "$PYTHON" -m "$MAIN" "${CPU[@]}" \
    "${DATA[@]}" "${ACTOR[@]}" "${ROLLOUT[@]}" "${CRITIC[@]}" "${ALGO[@]}" "${TRAINER[@]}" "$@"
