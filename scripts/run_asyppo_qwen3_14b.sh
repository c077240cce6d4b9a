#!/usr/bin/env bash
# Train Qwen3-14B-Base on 5,000 DeepMath problems with AsyPPO: two mini-critics of 4 billion parameters.
#
#   Hardware  one node of 8 GPUs with 80 GB (GPU_GB=80, the default) or 141 GB (GPU_GB=141); NNODES for more than one
#   Memory    80 GB cards: 60 GiB, 141 GB cards: 125 GiB at the peak of all four algorithms (planned)
#   Time      8 H100: 101 h, 8 H200: 84 h for 312 steps (ALGO=ppo: 153 h, 127 h), and about 4 h, 2 h for 14 validations,
#             each of 1,550 problems with 4 samples (estimates of the same plans, not measured)
#   Plans     80 GB cards: python -m recipe.asyppo.plan --actor 14b --critic 4b --actor-offload --critic-offload \
#                 --critic-tokens 18432 --value-tokens 18432 --tensor-parallel 2 --gpu-memory-utilization 0.75
#             141 GB cards: python -m recipe.asyppo.plan --actor 14b --critic 4b --hardware h200 --tensor-parallel 2
#   Expect    the paper reports about 3 points over symmetric PPO (mean of six benchmarks, avg@4); not reproduced by us
#
# Before:  python -m recipe.asyppo.data.prepare_data
# Usage:   ALGO=asyppo|ppo|ppo_small_critic|grpo bash scripts/run_asyppo_qwen3_14b.sh [any verl override]
#          CRITIC_MODEL=Qwen/Qwen3-1.7B-Base takes mini-critics of 1.7 billion, the paper's other choice
# Settings and their sources: recipe/asyppo/README.md. All variables: recipe/asyppo/run_qwen3.sh.
set -euo pipefail
NAME=${NAME:-qwen3_14b}
ACTOR_MODEL=${ACTOR_MODEL:-Qwen/Qwen3-14B-Base}
CRITIC_MODEL=${CRITIC_MODEL:-Qwen/Qwen3-4B-Base}
case ${GPU_GB:-80} in
    80)
        ACTOR_OFFLOAD=${ACTOR_OFFLOAD:-True} CRITIC_OFFLOAD=${CRITIC_OFFLOAD:-True} CRITIC_TOKENS=${CRITIC_TOKENS:-18432}
        ROLLOUT_TP=${ROLLOUT_TP:-2} GPU_MEMORY_UTILIZATION=${GPU_MEMORY_UTILIZATION:-0.75}
        ;;
    141)
        ROLLOUT_TP=${ROLLOUT_TP:-2} GPU_MEMORY_UTILIZATION=${GPU_MEMORY_UTILIZATION:-0.6}
        ;;
esac
source "$(dirname "$0")/../recipe/asyppo/run_qwen3.sh"
