"""Messages that no other test triggers: each fault is caused on purpose, and ends in its message.

`scripts/checks/errors.py` runs the suite and lists the messages of the package that nothing triggered.
"""

import copy
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

from ast_sparse import AstSparse24Config
from ast_sparse.cli import eval as eval_command
from ast_sparse.cli.options import check_json_file
from ast_sparse.config import DistillationConfig
from ast_sparse.evaluation.harness import Harness
from ast_sparse.export import export as checkpoint
from ast_sparse.export.codec import Codec
from ast_sparse.export.export import export_model
from ast_sparse.sparsity.masks import Pattern
from ast_sparse.sparsity.model import decoder_blocks
from ast_sparse.sparsity.statistics import calibrate_blocks
from ast_sparse.storage import files, sharded
from ast_sparse.storage.checksums import check_checksums, write_checksums
from ast_sparse.storage.load import load_causal_lm
from ast_sparse.storage.locate import load_model_config
from ast_sparse.storage.slorb_adapter import check_pairs, read_adapter
from ast_sparse.training.checks.arguments import check_arguments
from ast_sparse.training.checks.features import check_feature_settings
from ast_sparse.training.fsdp import check_shardable, load_weights, sharding_plugin
from ast_sparse.training.start.blocks import as_blocks
from tests.evaluation.tasks import choice_task
from tests.export.sparse_models import save_training_checkpoint, sparse_model
from tests.faults import ends_in_a_line
from tests.models import save_tiny_model, tiny_config, tiny_model, tiny_tokenizer

Patch = pytest.MonkeyPatch


def broken(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("no such thing\nin here")


def no_package(*args: Any, **kwargs: Any) -> Any:
    raise ImportError("gguf is not installed")


def changed_on_disk(change: Callable[[Any], None]) -> Callable[..., Any]:
    """A `load_checkpoint` that returns an export changed."""
    load = checkpoint.load_checkpoint

    def changed(*args: Any, **kwargs: Any) -> Any:
        loaded = load(*args, **kwargs)
        change(loaded)
        return loaded

    return changed


# ---- exports -----------------------------------------------------------------------------------------------------


def adapter_that_differs(root: Path, patch: Patch) -> None:
    patch.setattr(checkpoint, "load_checkpoint", changed_on_disk(lambda loaded: loaded.slorb.clear()))
    export_model(sparse_model(slorb_k=8), root / "out", "dense")


def negative_zeros(root: Path, patch: Patch) -> None:
    def negate(loaded: Any) -> None:
        weight = loaded.model.model.layers[0].mlp.up_proj.weight.data
        weight[weight == 0] = -0.0

    patch.setattr(checkpoint, "load_checkpoint", changed_on_disk(negate))
    export_model(sparse_model(), root / "out", "dense")


def export_without_pattern(root: Path, patch: Patch) -> None:
    def deny(loaded: Any) -> None:  # what is read back no longer fits any pattern
        patch.setattr(Pattern, "holds", lambda *args, **kwargs: False)

    patch.setattr(checkpoint, "load_checkpoint", changed_on_disk(deny))
    export_model(sparse_model(), root / "out", "dense")


def sizes_that_differ(root: Path, patch: Patch) -> None:
    patch.setattr(Codec, "stored_bytes", lambda self, rows, columns, itemsize: rows * columns)
    export_model(sparse_model(), root / "out", "compressed")


def export_with_peft(root: Path, patch: Patch) -> None:
    model: Any = tiny_model()
    model._hf_peft_config_loaded = True
    export_model(model, root / "out", "dense")


def export_of_compressed_layers(root: Path, patch: Patch) -> None:
    export_model(sparse_model(), root / "out", "compressed")
    loaded = AutoModelForCausalLM.from_pretrained(root / "out", quantization_config=AstSparse24Config(dequantize=False))
    export_model(loaded, root / "again", "dense")


# ---- files of checkpoints ----------------------------------------------------------------------------------------


def adapter_with_more(root: Path, patch: Patch) -> None:
    export_model(sparse_model(slorb_k=8), root / "out", "dense")
    file = root / "out" / "slorb" / "adapter_model.safetensors"
    save_file({**load_file(file), "more": torch.zeros(1)}, file)
    (file.parent / "checksums.json").unlink(missing_ok=True)
    read_adapter(file.parent)


def slorb_of_no_layer(root: Path, patch: Patch) -> None:
    check_pairs(tiny_model(), {"model.nowhere": (torch.zeros(4, 2), torch.zeros(2, 4))}, "out")


def mask_of_no_layer(root: Path, patch: Patch) -> None:
    folder = save_training_checkpoint(sparse_model(), root / "checkpoint-1")
    tensors = load_file(folder / "model.safetensors")
    for name in ("mask", "start_mask", "weight"):
        tensors[f"model.nowhere.{name}"] = tensors[f"model.layers.0.mlp.up_proj.{name}"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    load_causal_lm(folder)


def weights_that_vanish(root: Path, patch: Patch) -> None:
    save_tiny_model(root)
    write_checksums(root)
    (root / "model.safetensors").unlink()
    check_checksums(root, [root / "model.safetensors"])


def json_too_large(root: Path, patch: Patch) -> None:
    patch.setattr(files, "_LARGEST_JSON", 10)
    load_model_config(save_tiny_model(root / "model"))


def index_without_weights(root: Path, patch: Patch) -> None:
    (root / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    files.weight_files(root)


def tensors_of_no_file(root: Path, patch: Patch) -> None:
    (root / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    files.read_tensors([root / "model.safetensors"], lambda name: True)


def package_that_is_missing(root: Path, patch: Patch) -> None:
    patch.setattr(AutoConfig, "from_pretrained", no_package)
    load_model_config(save_tiny_model(root / "model"))


# ---- models ------------------------------------------------------------------------------------------------------


def model_without_blocks(root: Path, patch: Patch) -> None:
    decoder_blocks(torch.nn.Linear(4, 4))


def block_without_hidden_states(root: Path, patch: Patch) -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = torch.nn.Linear(4, 4)

        def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            return self.block(input=input_ids.float())

    model = Odd()
    blocks = {"block": model.block}
    next(calibrate_blocks(model, blocks, blocks, torch.zeros(1, 4, dtype=torch.long), with_hessian=False))


# ---- evaluation --------------------------------------------------------------------------------------------------


def report_without_rights(root: Path, patch: Patch) -> None:
    patch.setattr(os, "access", lambda path, mode: False)
    check_json_file(root / "figures.json")


def task_that_breaks(root: Path, patch: Patch) -> None:
    harness = Harness([str(choice_task(root, "mine"))])
    patch.setattr(harness._lm_eval, "evaluate", broken)
    harness(tiny_model(), tiny_tokenizer())


def teacher_of_another_tokenizer(root: Path, patch: Patch) -> None:
    other = copy.deepcopy(tiny_tokenizer())
    other.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True)
    other.save_pretrained(save_tiny_model(root / "teacher"))
    settings: Any = SimpleNamespace(teacher=str(root / "teacher"), trust_remote_code=False)
    texts: Any = [SimpleNamespace(documents=["the sparse model"])]
    eval_command._check_tokens(tiny_tokenizer(), texts, settings)


# ---- arguments and data of a trainer -----------------------------------------------------------------------------


def several_gpus_of_one_process(root: Path, patch: Patch) -> None:
    args = TrainingArguments(str(root), use_cpu=True)
    patch.setattr(TrainingArguments, "n_gpu", 2)
    check_arguments(args)


def rate_below_zero(root: Path, patch: Patch) -> None:
    schedule: dict[str, Any] = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": -1.0}}
    check_arguments(TrainingArguments(str(root), use_cpu=True, **schedule))


def text_without_tokenizer(root: Path, patch: Patch) -> None:
    as_blocks(Dataset.from_dict({"text": ["the text"]}), None, "text", 16)


def text_that_streams_into_a_trainer(root: Path, patch: Patch) -> None:
    as_blocks(Dataset.from_dict({"text": ["the text"]}).to_iterable_dataset(), tiny_tokenizer(), "text", 16)


def blocks_left_out_of_a_comparison(root: Path, patch: Patch) -> None:
    config = tiny_config("opt")
    config.layerdrop = 0.1
    check_feature_settings(DistillationConfig(kind="tinybert"), config, TrainingArguments(str(root), use_cpu=True))


# ---- sharded training --------------------------------------------------------------------------------------------


def launched(patch: Patch, root: Path, **environment: str) -> None:
    """The settings of `accelerate launch`, which TrainingArguments did not check."""
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **environment}.items():
        patch.setenv(name, value)
    sharding_plugin(TrainingArguments(str(root), use_cpu=True))


def sharding_by_an_unknown_policy(root: Path, patch: Patch) -> None:
    launched(patch, root, FSDP_AUTO_WRAP_POLICY="nowhere")


def sharding_but_for_some_modules(root: Path, patch: Patch) -> None:
    launched(patch, root, FSDP_IGNORED_MODULES="norm")


def sharding_of_a_conv1d(root: Path, patch: Patch) -> None:
    check_shardable(tiny_model("gpt2"))


def weights_of_another_model(root: Path, patch: Patch) -> None:
    load_weights(save_tiny_model(root / "model"), tiny_model("mistral"))


def merge_without_room(root: Path, patch: Patch) -> None:
    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    patch.setattr(sharded, "shard_faults", lambda folder: [])
    patch.setattr(sharded, "read_tensors", full)
    with sharded.merged(root / "checkpoint-2"):
        pass


CATALOGUE: list[tuple[Callable[[Path, Patch], None], str]] = [
    (adapter_that_differs, "Reading the export back failed, so nothing was kept: .*: the SLoRB adapter differs."),
    (negative_zeros, "Reading the export back failed, .* differs from the masked weight."),
    (export_without_pattern, "Reading the export back failed, .* is not 2:4."),
    (sizes_that_differ, "Reading the export back failed, .*: the pruned layers take .* bytes."),
    (export_with_peft, "Cannot export a model with a PEFT adapter attached. Give the folder it was loaded from."),
    (export_of_compressed_layers, "Cannot export compressed layers. Load the model with `dequantize: true`"),
    (adapter_with_more, "adapter_model.safetensors` holds no SLoRB pairs. Write the adapter again."),
    (slorb_of_no_layer, "`out` has SLoRB for 'model.nowhere', which the model lacks."),
    (mask_of_no_layer, "has a mask for `model.nowhere`, which the model lacks. Write it again."),
    (weights_that_vanish, "model.safetensors` cannot be read: No such file or directory. Copy or write"),
    (json_too_large, "config.json`: it is larger than 256 MiB. Restore the file."),
    (index_without_weights, "model.safetensors.index.json` lists no weights. Restore the file."),
    (tensors_of_no_file, "model.safetensors` is damaged: .* Copy or write the checkpoint again."),
    (package_that_is_missing, "Cannot load the configuration of .*: gguf is not installed. Install the package."),
    (model_without_blocks, "Linear has no list of decoder blocks"),
    (block_without_hidden_states, "`block` is not called with hidden states, so it cannot be calibrated on its own."),
    (report_without_rights, "--json .*figures.json: the folder .* cannot be written to."),
    (task_that_breaks, "--tasks .*mine.*: no such thing in here"),
    (sharding_by_an_unknown_policy, "fsdp_config of `accelerate launch`: .*nowhere.* Correct it."),
    (sharding_but_for_some_modules, "fsdp_config of `accelerate launch`: ignored_modules would not get the gradients"),
    (sharding_of_a_conv1d, "`transformer.h.0.attn.c_attn` is a Conv1D, whose mask groups FSDP2 would cut."),
    (teacher_of_another_tokenizer, "--teacher .*teacher makes different tokens from the same text. Name a teacher"),
    (several_gpus_of_one_process, "2 GPUs are visible to one process, and nn.DataParallel does not carry masks."),
    (rate_below_zero, "training.lr_scheduler_kwargs=.*: min_lr is negative. Set it to 0 or more."),
    (
        text_without_tokenizer,
        "The data set has raw text \\('text'\\) and there is no tokenizer. Pass processing_class.",
    ),
    (text_that_streams_into_a_trainer, "IterableDataset of raw text .* cannot be packed here. Tokenise it"),
    (blocks_left_out_of_a_comparison, "layerdrop=0.1 of the student leaves blocks out. Set model.config_overrides"),
    (merge_without_room, "checkpoint-2` cannot be merged beside it: .*No space left on device. Make room there"),
    (weights_of_another_model, "model: `lm_head.weight` is missing. Resume from another checkpoint."),
]


@pytest.mark.parametrize(("fault", "message"), CATALOGUE, ids=[fault.__name__ for fault, _ in CATALOGUE])
def test_a_fault_ends_in_its_line(
    fault: Callable[[Path, Patch], None], message: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    ends_in_a_line(fault, message, tmp_path, monkeypatch)
