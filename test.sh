#!/usr/bin/env bash
# The whole test suite, in an environment of its own: about 15 minutes on two cores after installing. Arguments go to pytest.
set -eu
cd "$(dirname "$0")"
. ./venv.sh
"$python" -m ruff --version >/dev/null 2>&1 || "$python" -m pip install -q --disable-pip-version-check "ruff==0.17.6" \
    || fail "pip could not install ruff, which checks the style before the tests (no network?)"
"$python" -c 'import matplotlib' 2>/dev/null || "$python" -m pip install -q --disable-pip-version-check "matplotlib>=3.8" \
    || fail "pip could not install matplotlib, which draws the curves that the tests look at (no network?)"
"$python" -m ruff check .
"$python" -m ruff format --check .
exec "$python" -m pytest -q --durations=10 "$@"
