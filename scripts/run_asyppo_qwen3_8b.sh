#!/usr/bin/env bash
# Train Qwen3-8B-Base on 5,000 DeepMath problems with AsyPPO: two mini-critics of 0.6 billion parameters.
#
#   Hardware  one node of 8 GPUs with 80 GB (GPU_GB=141 for 141 GB), 1 TB of memory; more nodes with NNODES
#   Memory    @MEM80@ GiB a GPU at the peak, as planned by python -m asyppo_verl.plan
#   Time      not measured by us on this hardware
#   Expect    the paper reports more than 6 points over symmetric PPO (average of six benchmarks, avg@4); not reproduced by us
#
# Before: python -m recipe.asyppo.prepare_data
# Usage:  ALGO=asyppo|ppo|ppo_small_critic|grpo bash scripts/run_asyppo_qwen3_8b.sh [any verl override]
# Settings and their sources: recipe/asyppo/README.md. Every variable: recipe/asyppo/run_qwen3.sh.
set -euo pipefail
NAME=${NAME:-qwen3_8b}
ACTOR_MODEL=${ACTOR_MODEL:-Qwen/Qwen3-8B-Base}
CRITIC_MODEL=${CRITIC_MODEL:-Qwen/Qwen3-1.7B-Base}
source "$(dirname "$0")/../recipe/asyppo/run_qwen3.sh"
