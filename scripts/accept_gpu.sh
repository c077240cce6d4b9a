#!/usr/bin/env bash
# See AsyPPO train on one GPU, in about eleven minutes (planned) after installation and without a network: the doctor, the
# toy task with SIGKILL and resume, the Qwen3 recipe with random weights against GRPO. Ends with a table and one line of JSON.
#
#   Hardware  one NVIDIA GPU: 4B actor from 120 GiB, 1.7B from 70 GiB, 0.6B from 20 GiB; 16 cores, 64 GB of memory; flash-attn
# Usage: bash scripts/accept_gpu.sh [--ppo] [FOLDER], which keeps logs and models (default runs/accept_gpu)
#   --ppo             symmetric PPO as well, four minutes more, where the card holds a critic of the actor's size
#   PYTHON=...        interpreter (default: recipe/asyppo/python.sh)
#   VERL_PLATFORM=cpu tiny shapes on a CPU, to try the script itself
set -euo pipefail
cd "$(dirname "$0")/.."
source recipe/asyppo/python.sh
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive} # as in recipe/asyppo/cpu.sh
exec "$PYTHON" -m recipe.asyppo.acceptance "$@"
