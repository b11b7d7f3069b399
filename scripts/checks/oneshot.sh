#!/usr/bin/env bash
# What do one-shot methods cost, and how good are they? Prunes SmolLM2-135M by magnitude, Wanda and SparseGPT,
# calibrated on 32 x 512 tokens of c4-rp, and prints the time of each and the WikiText-2 perplexity (6 windows of 1024).
# About ten minutes on two cores.
# usage: scripts/checks/oneshot.sh MODEL DATA OUT    DATA holds redpajama_sample/c4-rp.jsonl and wikitext2/wiki.test.raw
set -euo pipefail
[ $# -eq 3 ] || { sed -n 2,5p "$0" >&2; exit 2; }
model=$1 data=$2 out=$3
export PATH="$(cd "$(dirname "$0")/../.." && pwd)/.venv/bin:$PATH"
for method in magnitude wanda sparsegpt; do
  text=(--calibration "$data/redpajama_sample/c4-rp.jsonl" --samples 32 --seq-len 512)
  [ "$method" != magnitude ] || text=()  # it reads none
  SECONDS=0
  ast-prune "$model" "$out/$method" --method "$method" --dtype float32 --overwrite ${text[@]+"${text[@]}"}
  echo "$method: $SECONDS s, loading and writing included"
done
ast-eval "$model" "$out/magnitude" "$out/wanda" "$out/sparsegpt" \
  --dataset wikitext2 --data-dir "$data/wikitext2" --seq-len 1024 --limit 6
