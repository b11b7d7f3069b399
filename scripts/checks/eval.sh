#!/usr/bin/env bash
# Does ast-eval measure what others measure? WikiText-2 against a plain loop over transformers (published protocol,
# windows of 1024), and one text against a perplexity task of the LM Evaluation Harness. Prints the relative differences
# and fails above 1e-4. Six windows take about five minutes on two cores; "all" takes all of WikiText-2. Needs the extra
# harness.
# usage: scripts/checks/eval.sh MODEL DATA [WINDOWS|all]    DATA holds wikitext2/wiki.test.raw
set -euo pipefail
[ $# -ge 2 ] && [ $# -le 3 ] || { sed -n 2,6p "$0" >&2; exit 2; }
model=$1 text=$2/wikitext2/wiki.test.raw windows=${3:-6}
export PATH="$(cd "$(dirname "$0")/../.." && pwd)/.venv/bin:$PATH"
python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("lm_eval") is None)' ||
  { echo "Error: lm-eval is missing. Install it: bash scripts/install.sh gguf,slorb,harness" >&2; exit 2; }
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
limit=(--limit "$windows")
[ "$windows" != all ] || { limit=() windows=1000000; }
# the plain loop below puts no BOS; in the text with a prefix, the prefix is the BOS
ast-eval "$model" --dataset wikitext2 --data-dir "$text" --seq-len 1024 --bos none "${limit[@]}" --device cpu \
  --json "$out/ours.json"

# The harness puts the end-of-text token (or the begin token) before a text and predicts all of the text: here that
# token is part of the text, whose first token is context. 3 * 1024 tokens of text, so that the windows are the same.
python - "$model" "$text" "$out" <<'PY'
import json
import sys
from pathlib import Path

from ast_sparse.evaluation.perplexity import wikitext2_rows
from ast_sparse.storage.locate import load_tokenizer

model, text, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
tokenizer = load_tokenizer(model)
words = "\n\n".join(wikitext2_rows(data_dir=text)).split(" ")
while True:  # until a piece of 3 * 1024 tokens has the same tokens when it is tokenised again
    piece = tokenizer.decode(tokenizer(" ".join(words[:4000]), add_special_tokens=False)["input_ids"][: 3 * 1024])
    if len(tokenizer(piece, add_special_tokens=False)["input_ids"]) == 3 * 1024:
        break
    words = words[1:]
prefix = tokenizer.bos_token or tokenizer.eos_token
(out / "text.jsonl").write_text(json.dumps({"text": piece}) + "\n")
(out / "with_prefix.jsonl").write_text(json.dumps({"text": prefix + piece}) + "\n")
task = {
    "task": "text", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(out / "text.jsonl")}},
    "test_split": "test", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "bits_per_byte"}],
}
(out / "text.yaml").write_text(json.dumps(task))
PY
export HF_DATASETS_CACHE="$out/cache"
ast-eval "$model" --tasks "$out/text.yaml" --seq-len 1024 --device cpu --json "$out/harness.json"
ast-eval "$model" --dataset "$out/with_prefix.jsonl" --seq-len 1025 --stride 1024 --bos none --bits-per-byte \
  --device cpu --json "$out/covered.json"

python - "$model" "$text" "$windows" "$out" <<'PY'
import json
import math
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model, text, count, out = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
place = {"gguf_file": model.name} if model.suffix == ".gguf" else {}
name = model.parent if place else model
tokenizer = AutoTokenizer.from_pretrained(name, **place)
network = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **place).eval()
lines = text.read_text(encoding="utf-8").split("\n")
rows = [line + "\n" if line.strip() else "" for line in lines[: len(lines) - (not lines[-1])]]
tokens = tokenizer("\n\n".join(rows), add_special_tokens=False, return_tensors="pt")["input_ids"][0]
losses = []
for begin in range(0, len(tokens) - 1023, 1024)[:count]:
    window = tokens[begin : begin + 1024]
    with torch.no_grad():
        log_p = network(window[None]).logits[0].double().log_softmax(-1)
    losses.append(-log_p[:-1].gather(-1, window[1:, None]).mean())
plain = math.exp(torch.stack(losses).mean())
results = {key: json.loads((out / f"{key}.json").read_text()) for key in ("ours", "covered", "harness")}
pairs = {
    "WikiText-2, ast-eval and a plain loop": (results["ours"]["results"][0]["perplexity"], plain),
    "bits per byte, ast-eval and the harness": (
        results["covered"]["results"][0]["bits_per_byte"], results["harness"]["tasks"][0]["value"],
    ),
}
for what, (ours, other) in pairs.items():
    print(f"{what}: {ours:.6f} and {other:.6f}, relative difference {abs(ours / other - 1):.1e}")
sys.exit(any(abs(ours / other - 1) > 1e-4 for ours, other in pairs.values()))
PY
