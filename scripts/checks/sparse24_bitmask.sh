#!/usr/bin/env bash
# Are 2:4 checkpoints of compressed-tensors read as that library wrote them? Its last version that had the sparse formats
# writes a tiny model in both; ast-export, ast-eval and ast-train read them, and the weights are compared to the bit.
# usage: scripts/checks/sparse24_bitmask.sh OUT    makes OUT/venv, or uses the Python of CT_PYTHON
set -euo pipefail
[ $# -eq 1 ] || { sed -n 2,4p "$0" >&2; exit 2; }
root=$(cd "$(dirname "$0")/../.." && pwd) out=$1
python=${PYTHON:-$root/.venv/bin/python}
mkdir -p "$out"
writer=${CT_PYTHON:-$out/venv/bin/python}
if [ ! -x "$writer" ]; then
  "$python" -m venv "$out/venv"
  "$writer" -m pip install --quiet "compressed-tensors==0.14.0" torch
fi
export PYTHONPATH="$root"

"$python" - "$out" <<'PY'
import sys
from pathlib import Path

from ast_sparse import export_model
from tests.export.sparse_models import sparse_model
from tests.models import generated_text, tiny_tokenizer

out = Path(sys.argv[1])
export_model(sparse_model(), out / "dense", "dense", overwrite=True, tokenizer=tiny_tokenizer())
(out / "dense" / "sparsity_config.json").unlink()
(out / "text.txt").write_text(generated_text(4000))
PY
for format in sparse-24-bitmask sparse-bitmask; do
  rm -rf "$out/$format" "$out/$format-export" "$out/$format-run"
  env -u PYTHONPATH "$writer" - "$out" "$format" <<'PY'
import shutil
import sys
from pathlib import Path

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.config import SparsityCompressionConfig
from safetensors.torch import load_file, save_file

out, format = Path(sys.argv[1]), sys.argv[2]
folder = Path(shutil.copytree(out / "dense", out / format))
(folder / "checksums.json").unlink()
tensors = load_file(folder / "model.safetensors")
layers = {name.removesuffix(".weight") for name in tensors if name.endswith("_proj.weight")}
config = SparsityCompressionConfig.load_from_registry(
    format, format=format, targets=["Linear"], ignore=["lm_head"], global_sparsity=0.5, sparsity_structure="2:4"
)
compressor = ModelCompressor(sparsity_config=config)
stored = compressor.sparsity_compressor.compress(tensors, compression_targets=layers)
save_file({name: value.contiguous() for name, value in stored.items()}, folder / "model.safetensors", {"format": "pt"})
compressor.update_config(folder)
print(format, sorted({name.rpartition(".")[2] for name in stored}))
PY
  "$python" -m ast_sparse.cli.export "$out/$format" "$out/$format-export"
  "$python" -m ast_sparse.cli.eval "$out/dense" "$out/$format" "$out/$format-export" --dataset "$out/text.txt" \
    --seq-len 64 --limit 4 --device cpu
  printf '%s\n' "model: {name_or_path: $out/$format}" "data: {train: [$out/text.txt], block_size: 32}" \
    "training: {max_steps: 2, per_device_train_batch_size: 2, use_cpu: true, save_strategy: 'no', report_to: none}" \
    "evaluation: {datasets: []}" > "$out/run.yaml"
  "$python" -m ast_sparse.cli.train --config "$out/run.yaml" --output-dir "$out/$format-run" > "$out/train.log" 2>&1 ||
    { tail -3 "$out/train.log"; exit 1; }
  "$python" - "$out" "$format" <<'PY'
import sys

import torch
from safetensors.torch import load_file

from ast_sparse import load_causal_lm

out, format = sys.argv[1:]
expected = load_file(f"{out}/dense/model.safetensors")
for folder in (format, f"{format}-export"):
    found = load_causal_lm(f"{out}/{folder}", dtype="auto").state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items()), folder
print(f"{format}: all {len(expected)} tensors are the same to the bit")
PY
done
