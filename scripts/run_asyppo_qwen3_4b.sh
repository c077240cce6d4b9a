#!/usr/bin/env bash
# Train Qwen3-4B-Base on 5,000 DeepMath problems with AsyPPO: two mini-critics of 0.6 billion parameters.
#
#   Hardware  one node of 8 GPUs with 80 GB (GPU_GB=80, the default) or 141 GB (GPU_GB=141); NNODES for more than one
#   Memory    80 GB cards: 67 GiB, 141 GB cards: 117 GiB at the peak of all four algorithms (planned)
#   Time      8 H100: 47 h, 8 H200: 37 h for 312 steps (ALGO=ppo: 74 h, 59 h), and about 3 h, 2 h for 14 validations,
#             each of 1,550 problems with 4 samples (estimates of the same plans, not measured)
#   Plans     80 GB cards: python -m recipe.asyppo.plan --actor 4b --critic 0.6b --gpu-memory-utilization 0.7
#             141 GB cards: python -m recipe.asyppo.plan --actor 4b --critic 0.6b --hardware h200 --actor-tokens 36864 \
#                 --log-prob-tokens 73728 --gpu-memory-utilization 0.75
#   Expect    the paper reports more than 6 points over symmetric PPO (mean of six benchmarks, avg@4); not reproduced by us
#
# Before:  python -m recipe.asyppo.data.prepare_data
# Usage:   ALGO=asyppo|ppo|ppo_small_critic|grpo bash scripts/run_asyppo_qwen3_4b.sh [any verl override]
# Settings and their sources: recipe/asyppo/README.md. All variables: recipe/asyppo/run_qwen3.sh.
set -euo pipefail
NAME=${NAME:-qwen3_4b}
ACTOR_MODEL=${ACTOR_MODEL:-Qwen/Qwen3-4B-Base}
CRITIC_MODEL=${CRITIC_MODEL:-Qwen/Qwen3-0.6B-Base}
case ${GPU_GB:-80} in
    80)
        GPU_MEMORY_UTILIZATION=${GPU_MEMORY_UTILIZATION:-0.7}
        ;;
    141)
        ACTOR_TOKENS=${ACTOR_TOKENS:-36864} LOG_PROB_TOKENS=${LOG_PROB_TOKENS:-73728}
        GPU_MEMORY_UTILIZATION=${GPU_MEMORY_UTILIZATION:-0.75}
        ;;
esac
source "$(dirname "$0")/../recipe/asyppo/run_qwen3.sh"
