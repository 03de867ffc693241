#!/bin/sh
# Creates a virtual environment with pip: sh tools/venv.sh DIRECTORY [PYTHON]
# Needs a Python >= 3.11 and nothing else: looks for one, and does without ensurepip where a distribution left it out.
set -eu

directory=$1
new_enough='import sys; sys.exit(sys.version_info < (3, 11))'

python=""
for candidate in ${2:-} python3 python3.14 python3.13 python3.12 python3.11 python; do
    if "$candidate" -c "$new_enough" >/dev/null 2>&1; then
        python=$candidate
        break
    fi
    if [ "$candidate" = "${2:-}" ]; then
        echo "error: PYTHON=$candidate is not a Python >= 3.11" >&2
        exit 1
    fi
done
if [ -z "$python" ]; then
    echo "error: refimpl needs Python >= 3.11 and found none; install one, or say make PYTHON=/path/to/python" >&2
    exit 1
fi

echo "creating $directory with $("$python" --version)"
rm -rf "$directory"
if "$python" -c 'import ensurepip' >/dev/null 2>&1; then
    "$python" -m venv "$directory"
elif "$python" -m pip --version >/dev/null 2>&1; then
    "$python" -m venv --without-pip "$directory"
    "$python" -m pip --quiet --python "$directory/bin/python" install pip
elif "$python" -m virtualenv --version >/dev/null 2>&1; then
    "$python" -m virtualenv --quiet "$directory"
else
    echo "error: this Python has neither ensurepip nor pip; on Debian and Ubuntu: apt install python3-venv" >&2
    exit 1
fi
