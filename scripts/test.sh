#!/usr/bin/env bash
# Install what the tests need and run all of them: the fast ones first (ten minutes), then those with Ray workers, then
# whole training runs on the CPU (50 minutes in all). Arguments go to pytest: bash scripts/test.sh -m "not e2e and not ray"
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh
exec .venv/bin/python -m pytest "$@"
