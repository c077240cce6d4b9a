#!/usr/bin/env bash
# Everything that CI checks: style, format, types, then all tests.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
bash scripts/test.sh "$@"
