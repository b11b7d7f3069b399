#!/usr/bin/env bash
# Does the wheel work without the checkout? Builds it, installs it into a separate folder, and runs its commands there.
# It has the compiled C kernels, which multiply where there is no compiler. Built without a compiler it is a pure one.
# Needs .venv and a C compiler; a minute or two on two cores.
# usage: scripts/checks/wheel.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$PWD
had_build=$([ -e build ] && echo yes || :)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
build() { "$root/.venv/bin/pip" wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$@" .; }
CC=no-such-compiler build "$work/pure" --no-build-isolation # .venv has setuptools, for torch
ls "$work"/pure/ast_sparse-*-py3-none-any.whl >/dev/null
AST_SPARSE_CACHE=${AST_SPARSE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/ast_sparse} build "$work" # that of the tests
platform=$("$root/.venv/bin/python" -c 'import sysconfig; print(sysconfig.get_platform().replace("-", "_").replace(".", "_"))')
ls "$work"/ast_sparse-*-py3-none-"$platform".whl >/dev/null
"$root/.venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --target "$work/site" "$work"/ast_sparse-*.whl
if [ -z "$had_build" ] && [ -e build ]; then
  echo "wheel: build/ was left behind; its modules would be in later wheels" >&2
  exit 1
fi
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
PATH=/nowhere CC=no-such-compiler AST_SPARSE_CACHE="$work/cache" "$root/.venv/bin/python" - "$work/site" <<'PY'
import sys
from pathlib import Path

import torch

from ast_sparse.kernels.code24 import pack24
from ast_sparse.kernels.native import products24
from ast_sparse.kernels.native.compiling import library_file
from ast_sparse.kernels.native.library import of_level, usable_levels

assert library_file().is_relative_to(sys.argv[1]), library_file()
levels = usable_levels()
assert levels, "this CPU runs no level"
weight = torch.tensor([[1.0, 0, 0, 2], [0, 3, 4, 0]]).repeat(3, 4)
x = torch.arange(32.0).view(2, 16)
for level in levels:
    y = products24.linear(x, *pack24(weight), torch.ones(6), of_level(level))
    assert torch.equal(y, x @ weight.t() + 1), level  # small integers: no rounding
assert not Path("cache").exists(), "something was compiled"
print(f"wheel: compiled kernels multiply without a compiler ({', '.join(levels)})")
PY
for command in train prune eval export data bench; do
  "$root/.venv/bin/python" -m "ast_sparse.cli.$command" --help >/dev/null
done
echo "wheel: installs and works outside the checkout"
