#!/usr/bin/env bash
# Put runs side by side: reward, step time, the critic's share, memory, and benchmarks with the paired difference to the
# first run. Prints Markdown within seconds; needs no GPU.
#
# Usage: bash scripts/compare.sh RUN_A RUN_B ... [--json OUT.json]
#   RUN   a run folder, or the folder of an evaluation (scripts/evaluate.sh writes RUN_DIR/evaluation/global_step_N)
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=${PYTHON:-$([ -x "$ROOT/.venv/bin/python" ] && echo "$ROOT/.venv/bin/python" || echo python3)}
PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH} exec "$PYTHON" -m recipe.asyppo.evaluation.compare "$@"
