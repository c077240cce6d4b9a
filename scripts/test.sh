#!/usr/bin/env bash
# Install what the tests need and run all of them: the fast ones first (ten minutes), then those with Ray workers, then
# whole training runs on the CPU (50 minutes in all). Arguments go to pytest: bash scripts/test.sh -m "not e2e and not ray"
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh
# The tests of reports open them in a browser.
if ! command -v chromium google-chrome chrome > /dev/null && [ "$(id -u)" = 0 ]; then
    echo "test: installing chromium"
    apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium > /dev/null
fi
exec .venv/bin/python -m pytest "$@"
