#!/usr/bin/env bash
# Are the NEON kernels right? Compiles them for AArch64 and runs random cases under qemu, against float64 (neon.py).
# Once as they are and once with traps for undefined behaviour; tensors end at pages that may not be read.
# Needs .venv and, on Debian, apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user. A few minutes.
# usage: scripts/checks/neon.sh [CASES [FIRST_SEED]]    exit code 1: wrong, 2: a tool is missing
set -euo pipefail
cd "$(dirname "$0")/../.."
cases=${1:-2000} seed=${2:-0} python=${PYTHON:-.venv/bin/python}
for tool in aarch64-linux-gnu-gcc qemu-aarch64 "$python"; do
  command -v "$tool" >/dev/null || { echo "neon: $tool is missing, see the top of scripts/checks/neon.sh" >&2; exit 2; }
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH=$PWD
"$python" scripts/checks/neon.py write "$work/cases" "$cases" "$seed"
for more in "" "-fsanitize=undefined -fsanitize-undefined-trap-on-error"; do
  # shellcheck disable=SC2086 # several options
  aarch64-linux-gnu-gcc -std=gnu11 -O3 -Wall -Wextra -Werror $more -static -I ast_sparse/kernels/native/src \
    ast_sparse/kernels/native/src/*.c scripts/checks/neon.c -o "$work/neon"
  qemu-aarch64 "$work/neon" "$work/cases" "$work/results"
  "$python" scripts/checks/neon.py compare "$work/results" "$cases" "$seed"
done
