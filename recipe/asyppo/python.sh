# Sets PYTHON, unless it is set, for a script that runs in the clone's root: .venv's interpreter if there is one, else python3.
# What scripts/install.sh puts into .venv (with the file `installed`) is for a CPU, and taken with VERL_PLATFORM=cpu only.
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    if [ "${VERL_PLATFORM:-}" != cpu ] && [ -e .venv/installed ]; then
        echo "taking python3: .venv has the packages for a CPU; set PYTHON to another interpreter, or VERL_PLATFORM=cpu" >&2
    elif [ -x .venv/bin/python ]; then
        PYTHON=.venv/bin/python
    fi
fi
