#!/usr/bin/env bash
# What does a short run on a real model gain? Retrains SmolLM2-135M for 60 steps on four RedPajama domains and prints
# the WikiText-2 perplexity (6 windows of 1024) of the dense, the one-shot and the retrained model; then exports both
# formats and compares them. About half an hour on two cores.
# usage: scripts/checks/smollm2.sh MODEL DATA OUT    DATA holds redpajama_sample/*.jsonl and wikitext2/wiki.test.raw
set -euo pipefail
[ $# -eq 3 ] || { sed -n 2,5p "$0" >&2; exit 2; }
model=$1 data=$2 out=$3
export PATH="$(cd "$(dirname "$0")/../.." && pwd)/.venv/bin:$PATH"
ast-train --config "$(dirname "$0")/../../configs/smollm2_135m.yaml" --output-dir "$out/run" \
  --set "model.name_or_path=$model" --set "data.root=$data/redpajama_sample" \
  --set 'evaluation.datasets=[heldout, wikitext2]' --set "evaluation.data_dir=$data/wikitext2" \
  --set evaluation.seq_len=1024 --set evaluation.windows=6
ast-export "$out/run" "$out/dense" --format dense
ast-export "$out/run" "$out/compressed" --format compressed
ast-eval "$out/run" "$out/dense" "$out/compressed" \
  --dataset wikitext2 --data-dir "$data/wikitext2" --seq-len 1024 --limit 6
