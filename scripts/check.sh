#!/usr/bin/env bash
# Everything that CI checks: style, format and types (.pre-commit-config.yaml), then all tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh
PRE_COMMIT_HOME=$PWD/.venv/pre-commit .venv/bin/pre-commit run --all-files
bash scripts/test.sh "$@"
