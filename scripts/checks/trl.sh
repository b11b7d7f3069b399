#!/usr/bin/env bash
# Does TRL's SFTTrainer keep a sparse model 2:4? Fine-tunes a tiny one on generated conversations with
# KeepSparsityCallback, resumes it from a checkpoint, exports the result compressed; then trains LoRA over it and merges
# that under the masks.
# usage: scripts/checks/trl.sh OUT    makes OUT/venv, or uses the Python of TRL_PYTHON (with trl and this project)
set -euo pipefail
[ $# -eq 1 ] || { sed -n 2,5p "$0" >&2; exit 2; }
root=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$1"
out=$(cd "$1" && pwd) # the check runs in another folder
python=${TRL_PYTHON:-$out/venv/bin/python}
[[ $python = /* ]] || python=$PWD/$python
if [ ! -x "$python" ]; then
  "${PYTHON:-python3}" -m venv "$out/venv"
  "$python" -m pip install --quiet --constraint "$root/scripts/constraints.txt" torch
  "$python" -m pip install --quiet --constraint "$root/scripts/constraints.txt" trl --editable "${root}[slorb]"
fi
cd "$root"
"$python" - "$out" <<'PY'
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from ast_sparse import KeepSparsityCallback, export_model, merge_adapter_sparse
from tests.export.sparse_models import sparse_model
from tests.models import generated_text, tiny_tokenizer

out = Path(sys.argv[1])
export_model(sparse_model(), out / "start", "dense", dtype="float32", overwrite=True, tokenizer=tiny_tokenizer())
texts = generated_text(256).splitlines()
chats = Dataset.from_list([{"prompt": texts[i], "completion": " " + texts[i + 1]} for i in range(0, 256, 2)])


def trainer(name: str, **more: object) -> SFTTrainer:
    settings = SFTConfig(
        str(out / name), max_steps=10, save_steps=5, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        learning_rate=1e-3, weight_decay=0.1, max_length=64, use_cpu=True, report_to="none", disable_tqdm=True,
        bf16=False, logging_steps=5,
    )
    model = AutoModelForCausalLM.from_pretrained(out / "start")
    more = {"callbacks": [KeepSparsityCallback()], **more}
    return SFTTrainer(model, settings, train_dataset=chats, processing_class=tiny_tokenizer(), **more)


def pruned(model: torch.nn.Module) -> list[torch.Tensor]:
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return [layer.weight == 0 for name, layer in model.named_modules() if name.endswith(names)]


def same_zeros(model: torch.nn.Module) -> bool:
    return all(torch.equal(*pair) for pair in zip(pruned(model), start, strict=True))


start = pruned(AutoModelForCausalLM.from_pretrained(out / "start"))
plain = trainer("plain", callbacks=[])
plain.train()
assert not same_zeros(plain.model), "without the callback the zeros are lost"
whole = trainer("whole")
whole.train()
assert len(start) == 14 and same_zeros(whole.model)
resumed = trainer("resumed")
resumed.train(resume_from_checkpoint=str(out / "whole" / "checkpoint-5"))
pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
assert all(torch.equal(one, two) for one, two in pairs), "a resumed run has other bits"
whole.save_model(str(out / "tuned"))
report = export_model(out / "tuned", out / "compressed", overwrite=True)
print(f"SFTTrainer kept {report.pruned.layers} layers {report.pattern}; a resumed run has the same bits")

lora = trainer("lora", peft_config=LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
lora.train()
ids = torch.tensor(tiny_tokenizer()("\n".join(texts))["input_ids"][:1024]).view(8, 128)
merged, cost = merge_adapter_sparse(lora.model, samples=[ids])
assert same_zeros(merged)
print("LoRA merged under the masks:", *cost.lines(), sep="\n")
PY
