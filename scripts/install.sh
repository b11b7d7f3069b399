#!/usr/bin/env bash
# Make .venv and install ast_sparse with the given extras (default: gguf,slorb), at the pinned versions.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  { echo "Error: $python is older than 3.11. Set PYTHON to a newer one." >&2; exit 2; }
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip=(.venv/bin/pip install --quiet --disable-pip-version-check --constraint scripts/constraints.txt)
"${pip[@]}" --upgrade pip # Python 3.11 comes with 23.2, which takes twice as long to compare versions
# torch first and alone: the exact version selects the build that fits the machine
"${pip[@]}" torch
"${pip[@]}" --editable ".[${1:-gguf,slorb}]"
