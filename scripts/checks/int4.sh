#!/usr/bin/env bash
# What do 4-bit values cost a 2:4 model (paper Table 10)? Prunes MODEL by SparseGPT on 32 x 512 tokens of c4-rp, exports
# it with 16-bit values, with 4-bit values rounded to the nearest step, and with 4-bit values by AWQ on the same text, and
# prints sizes beside the paper's formula and the WikiText-2 perplexity of each (6 windows of 1024).
# SmolLM2-135M-Instruct as a Q4_1 .gguf file had 4-bit weights before pruning, which may flatter the result.
# usage: scripts/checks/int4.sh MODEL DATA OUT    DATA holds redpajama_sample/c4-rp.jsonl and wikitext2/wiki.test.raw
set -euo pipefail
[ $# -eq 3 ] || { sed -n 2,6p "$0" >&2; exit 2; }
model=$1 data=$2 out=$3
export PATH="$(cd "$(dirname "$0")/../.." && pwd)/.venv/bin:$PATH"
text=(--calibration "$data/redpajama_sample/c4-rp.jsonl" --samples 32 --seq-len 512)
ast-prune "$model" "$out/pruned" --method sparsegpt --dtype float32 --overwrite "${text[@]}"
ast-export "$out/pruned" "$out/bf16" --format compressed --overwrite
ast-export "$out/pruned" "$out/nearest" --format compressed-int4 --calibration none --overwrite
ast-export "$out/pruned" "$out/awq" --format compressed-int4 "${text[@]}" --overwrite
ast-eval "$out/bf16" "$out/nearest" "$out/awq" \
  --dataset wikitext2 --data-dir "$data/wikitext2" --seq-len 1024 --limit 6
