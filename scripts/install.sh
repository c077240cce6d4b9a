#!/usr/bin/env bash
# Install what the CPU runs and the tests need into .venv. About three minutes the first time, a second afterwards.
# PYTHON names the interpreter (3.11 or 3.12; default python3). TORCH_INDEX names the package index with torch's CPU
# wheels (default: PyTorch's own); set it to "" where only your usual index can be reached.
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH_INDEX=${TORCH_INDEX-https://download.pytorch.org/whl/cpu}
TORCH=$(sed -n 's/^torch==//p' requirements-cpu.txt)
WANTED=$(cat scripts/install.sh requirements-cpu.txt requirements-dev.txt setup.cfg pyproject.toml | sha256sum | cut -d' ' -f1)
STAMP=.venv/installed
is_installed() { [ "$(cat "$STAMP" 2>/dev/null)" = "$WANTED" ]; }
is_installed && exit 0
# One at a time: the one that waited finds the work done.
exec 9<scripts/install.sh
flock 9
is_installed && exit 0

# pip, without its notes about index files that it could not verify.
pip_install() { .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@" 2> >(grep -v '^WARNING' >&2); }

PYTHON=${PYTHON:-python3}
"$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || {
    echo "install: $("$PYTHON" --version) is not supported; set PYTHON to a Python 3.11 or 3.12" >&2
    exit 1
}
[ -x .venv/bin/python ] || { echo "install: creating .venv"; "$PYTHON" -m venv .venv; : > "$STAMP"; }
if [ ! -f "$STAMP" ] && .venv/bin/python -c "import sys, torch; sys.exit(torch.version.cuda is None)" 2>/dev/null; then
    echo "install: .venv has torch for CUDA, which the pinned CPU packages would replace; give it another name than .venv" >&2
    exit 1
fi

if ! .venv/bin/python -c "import sys, torch; sys.exit(torch.__version__.split('+')[0] != '$TORCH')" 2>/dev/null; then
    echo "install: torch $TORCH for the CPU"
    # A find-links folder of your pip configuration is looked at first, then torch's CPU index.
    pip_install --no-deps --no-index "torch==$TORCH" 2>/dev/null ||
        pip_install --no-deps ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch==$TORCH"
fi
echo "install: verl, vLLM, Ray and the rest, pinned (about two minutes)"
pip_install --no-deps -r requirements-cpu.txt
pip_install --no-deps -r requirements-dev.txt
# The older of the two supported releases, beside the newer one: tests/test_older_verl.py puts it first on the path.
pip_install --no-deps --upgrade --target .venv/verl-0.9.0 verl==0.9.0
echo "install: asyppo_verl itself, editable"
pip_install --no-deps --no-build-isolation --editable .
echo "$WANTED" > "$STAMP"
echo "install: done; activate with: source .venv/bin/activate"
