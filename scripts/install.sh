#!/usr/bin/env bash
# Make .venv and install ast_sparse with the given extras (default: gguf,slorb), at the pinned versions.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  { echo "Error: $python is older than 3.11. Set PYTHON to a newer one." >&2; exit 2; }
[ -x .venv/bin/python ] || "$python" -m venv .venv
# torch first and alone: the exact version selects the build that fits the machine
.venv/bin/pip install --quiet --disable-pip-version-check --constraint scripts/constraints.txt torch
.venv/bin/pip install --quiet --disable-pip-version-check --constraint scripts/constraints.txt --editable ".[${1:-gguf,slorb}]"
