# Sourced by demo.sh and test.sh: makes .venv from requirements.txt once, and sets $python. Says in one line what is missing.
fail() { echo "$0: $*" >&2; exit 1; }
command -v python3 >/dev/null || fail "python3 is missing: install Python 3.10 to 3.13"
python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "$(python3 -V) is too old: Python 3.10 to 3.13 is needed"
python="$PWD/.venv/bin/python"
stamp=.venv/installed-$(cksum < requirements.txt | cut -d' ' -f1)
if [ ! -e "$stamp" ]; then
    python3 -m venv .venv >/dev/null 2>&1 || fail "python3 has no working venv module: install it (Debian: apt install python3-venv)"
    echo "installing requirements.txt into .venv (torch is large: some minutes)"
    # torch and torchvision are resolved together, so that their builds match
    "$python" -m pip install -q --disable-pip-version-check -r requirements.txt 2>.venv/pip.log \
        || fail "pip could not install requirements.txt (no network?): $(grep -m1 -i error .venv/pip.log || tail -n1 .venv/pip.log)"
    "$python" -c 'import torch, torchvision, open_clip, transformers, av' 2>.venv/pip.log \
        || fail "the installed packages do not import together: $(tail -n1 .venv/pip.log)"
    touch "$stamp"
fi
