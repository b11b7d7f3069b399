#!/usr/bin/env bash
# Does the wheel work without the checkout? Builds it, installs it into a separate folder, and runs its commands there.
# Needs .venv; a minute or two on two cores.
# usage: scripts/checks/wheel.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$root/.venv/bin/pip" wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$work" .
"$root/.venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --target "$work/site" "$work"/ast_sparse-*.whl
cd "$work"
export PYTHONPATH="$work/site" # before the editable install of the checkout
"$root/.venv/bin/python" - "$work/site" <<'PY'
import sys
from pathlib import Path

import ast_sparse

assert Path(ast_sparse.__file__).is_relative_to(sys.argv[1]), ast_sparse.__file__
assert (Path(ast_sparse.__file__).parent / "py.typed").is_file(), "py.typed is not in the wheel"
missing = [name for name in ast_sparse.__all__ if getattr(ast_sparse, name) is None]
assert not missing, missing
PY
for command in train prune eval export data; do
  "$root/.venv/bin/python" -m "ast_sparse.cli.$command" --help >/dev/null
done
echo "wheel: installs and works outside the checkout"
