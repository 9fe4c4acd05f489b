#!/usr/bin/env bash
# All but the slow tests and those for a GPU, in an environment of its own: 12 minutes on two quick cores after installing, 26 on slow ones. Arguments go to pytest.
set -eu
cd "$(dirname "$0")"
. ./venv.sh
# what only the tests use: the style checks, two processes at once, and the curves that are drawn where matplotlib is installed
tools="ruff==0.17.6 pytest-xdist>=3.6 matplotlib>=3.8"
stamp=.venv/tools-$(echo "$tools" | cksum | cut -d' ' -f1)
if [ ! -e "$stamp" ]; then
    "$python" -m pip install -q --disable-pip-version-check $tools || fail "pip could not install $tools, which the tests need (no network?)"
    touch "$stamp"
fi
"$python" -m ruff check .
"$python" -m ruff format --check .
# files are handed out to two processes, each file whole, because its tests share what they prepare
exec "$python" -m pytest -q --durations=10 -n 2 --dist loadfile "$@"
