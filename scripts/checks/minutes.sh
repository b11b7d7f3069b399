#!/usr/bin/env bash
# What do minutes on two CPU cores give? Prunes SmolLM2-135M in one shot with permutations and an epoch of block-wise
# recovery, runs configs/recipes/minutes.yaml (rotation, SparseGPT, recovery, 60 steps of 2048 tokens), and exports its
# result. Prints the time of each and the WikiText-2 perplexity (6 windows of 1024). Fails if one shot is above 95 or the
# recipe above 55. About half an hour on two quiet cores.
# usage: scripts/checks/minutes.sh MODEL DATA OUT    DATA holds redpajama_sample/*.jsonl and wikitext2/wiki.test.raw
set -euo pipefail
[ $# -eq 3 ] || { sed -n 2,6p "$0" >&2; exit 2; }
model=$1 data=$2 out=$3
root="$(cd "$(dirname "$0")/../.." && pwd)"
export PATH="$root/.venv/bin:$PATH"
SECONDS=0
ast-prune "$model" "$out/one_shot" --method sparsegpt --permute --recovery-epochs 1 --recovery-learning-rate 2e-3 \
  --dtype float32 --overwrite --calibration "$data/redpajama_sample/c4-rp.jsonl" --samples 32 --seq-len 512
one_shot=$SECONDS
SECONDS=0
ast-train --config "$root/configs/recipes/minutes.yaml" --output-dir "$out/run" --overwrite \
  --set "model.name_or_path=$model" --set "data.root=$data/redpajama_sample" --set "evaluation.data_dir=$data/wikitext2"
recipe=$SECONDS
ast-export "$out/run" "$out/compressed" --format compressed --overwrite
ast-eval "$out/one_shot" "$out/run" "$out/compressed" --json "$out/perplexity.json" \
  --dataset wikitext2 --data-dir "$data/wikitext2" --seq-len 1024 --limit 6
echo "one shot: $one_shot s, loading and writing included; recipe: $recipe s, calibration and evaluation included"
python - "$out/perplexity.json" <<'PYTHON'
import json, sys
one_shot, run, _ = (result["perplexity"] for result in json.load(open(sys.argv[1]))["results"])
sys.exit(f"one shot {one_shot:.2f} is above 95, or the recipe {run:.2f} above 55" if one_shot > 95 or run > 55 else 0)
PYTHON
