#!/usr/bin/env bash
# Do TensorBoard and Weights & Biases (offline) hold what a run logs, once, also if the run is stopped and resumed?
# Runs a tiny model once undisturbed and once with SIGTERM in between, and reads both trackers' files back.
# usage: scripts/checks/trackers.sh OUT    makes OUT/venv, or uses the Python of TRACKERS_PYTHON (with wandb,
#        tensorboard and this project)
set -euo pipefail
[ $# -eq 1 ] || { sed -n 2,5p "$0" >&2; exit 2; }
root=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$1"
out=$(cd "$1" && pwd) # the check runs in another folder
python=${TRACKERS_PYTHON:-$out/venv/bin/python}
[[ $python = /* ]] || python=$PWD/$python
if [ ! -x "$python" ]; then
  "${PYTHON:-python3}" -m venv "$out/venv"
  "$python" -m pip install --quiet --constraint "$root/scripts/constraints.txt" torch
  "$python" -m pip install --quiet --constraint "$root/scripts/constraints.txt" wandb tensorboard --editable "$root"
fi
cd "$root"
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" "$python" scripts/checks/trackers.py "$out"
