#!/usr/bin/env bash
# The whole test suite, in an environment of its own: some 25 minutes on two cores after installing. Arguments go to pytest.
set -eu
cd "$(dirname "$0")"
. ./venv.sh
exec "$python" -m pytest -q --durations=10 "$@"
