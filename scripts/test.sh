#!/usr/bin/env bash
# Install what the tests need and run all of them: the fast ones on all cores, then those with Ray workers or training runs
# on the CPU, two at a time, then what must have the machine to itself. Arguments go to pytest:
#   bash scripts/test.sh -m "not ray and not e2e"
#   bash scripts/test.sh tests/test_asyppo.py -k shard
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh
# The report's page is opened in a real browser, which pip does not bring.
if ! command -v chromium google-chrome chrome > /dev/null && [ "$(id -u)" = 0 ]; then
    echo "test: installing chromium"
    apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium > /dev/null
fi
unset PYTHONDONTWRITEBYTECODE # what a hundred processes import is compiled once
FAST="not ray and not e2e" SLOW="(ray or e2e) and not alone"
# Which process runs what: tests/conftest.py.
ON_ALL_CORES=(-n auto --durations=25) TWO_AT_A_TIME=(-n 2 --durations=25)
if [ $# = 0 ]; then
    .venv/bin/python -m pytest "${ON_ALL_CORES[@]}" -m "$FAST"
    .venv/bin/python -m pytest "${TWO_AT_A_TIME[@]}" -m "$SLOW"
    exec .venv/bin/python -m pytest -m alone
fi
[ "$*" = "-m $FAST" ] && set -- "${ON_ALL_CORES[@]}" "$@"
exec .venv/bin/python -m pytest "$@"
