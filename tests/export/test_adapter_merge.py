"""LoRA merged under the masks, against the same in plain float64."""

import math
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from click.testing import CliRunner
from peft import HRAConfig, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from ast_sparse import AstSparse24Config, export_model, load_causal_lm, merge_adapter_sparse
from ast_sparse.cli.export import main as export
from ast_sparse.errors import UserError
from ast_sparse.storage.files import read_json
from tests.export.sparse_models import masked_state, plain_sparse_model, sparse_model, token_ids
from tests.models import generated_text, tiny_model, tiny_tokenizer

TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}


def base(family: str = "llama") -> PreTrainedModel:
    return plain_sparse_model(family).eval()


def adapted(model: Any, family: str = "llama", **settings: Any) -> PeftModel:
    """LoRA that is not zero, the same in each call."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS[family], fan_in_fan_out=family == "gpt2", **settings)
    result = get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    return result


def mean_loss(model: Any, ids: Tensor) -> float:
    """In plain loops."""
    found = []
    with torch.no_grad():
        for row in ids:
            log_p = model(input_ids=row[None]).logits[0].double().log_softmax(-1)
            found += [-float(log_p[place, row[place + 1]]) for place in range(len(row) - 1)]
    return sum(found) / len(found)


def test_a_token_without_an_embedding_is_refused() -> None:
    with pytest.raises(UserError, match="The text has the token 128, but the model has 128 embeddings"):
        merge_adapter_sparse(adapted(base("llama")), samples=[torch.full((1, 4), 128)])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_merged_weight_is_the_masked_sum(family: str) -> None:
    plain, model, ids = base(family), adapted(base(family), family), token_ids()
    expected = {"base": mean_loss(plain, ids), "adapter": mean_loss(model, ids)}
    state = {name.removeprefix("base_model.model."): value.double() for name, value in model.state_dict().items()}
    merged, report = merge_adapter_sparse(model, samples=[ids[:1], ids[1:]])
    found, layers = merged.state_dict(), 0
    for name, weight in plain.state_dict().items():
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A.default.weight" not in state:
            assert torch.equal(found[name], weight), name
            continue
        change = 6 / 4 * state[f"{layer}.lora_B.default.weight"] @ state[f"{layer}.lora_A.default.weight"]
        whole = weight.double() + (change.t() if family == "gpt2" else change)
        kept = torch.where(weight != 0, whole, 0)
        assert torch.allclose(found[name].double(), kept, rtol=0, atol=1e-6)
        assert torch.equal(found[name] == 0, weight == 0)
        assert report.errors[layer] == pytest.approx(math.sqrt(1 - float((kept**2).sum() / (whole**2).sum())), rel=1e-4)
        layers += 1
    assert len(report.errors) == layers == (4 if family == "llama" else 6)
    expected["merged"] = mean_loss(merged, ids)
    assert report.losses == pytest.approx(expected, rel=1e-5) and report.tokens == 2 * 11
    assert len(set(expected.values())) == 3
    lines = report.lines()
    assert len(lines) == 4 + (family == "gpt2") and lines[-1].startswith("loss over 22 tokens: base ")
    assert isinstance(merged, PreTrainedModel)


METHODS = {
    "rslora": (LoraConfig(r=4, target_modules=["q_proj"], use_rslora=True, alpha_pattern={"q_proj": 5}), 2),
    "dora": (LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=True), 4),
    "hra": (HRAConfig(r=4, target_modules=["q_proj"]), 2),
    "copies": (LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["up_proj"], bias="all"), 4),
    "block": (LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["mlp"]), 8),
}


@pytest.mark.parametrize("method", METHODS)
def test_other_methods_are_merged_as_peft_does_and_masked(method: str) -> None:
    def made() -> PeftModel:
        torch.manual_seed(0)
        model = get_peft_model(base(), METHODS[method][0]).eval()
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, 0, 0.3)
        return model

    start = base().state_dict()
    expected = made().merge_and_unload().state_dict()
    merged, report = merge_adapter_sparse(made())
    assert len(report.errors) == METHODS[method][1] and min(report.errors.values()) > 0.1
    for name, value in merged.state_dict().items():
        is_pruned = name.endswith("_proj.weight")
        kept = torch.where(start[name] != 0, expected[name], 0) if is_pruned else expected[name]
        assert torch.equal(value, kept), name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("merge")
    export_model(sparse_model(), root / "base", "compressed", dtype="float32", tokenizer=tiny_tokenizer())
    adapted(AutoModelForCausalLM.from_pretrained(root / "base")).save_pretrained(str(root / "lora"))
    (root / "text.txt").write_text(generated_text(400))
    export_model(sparse_model(slorb_k=16), root / "with_slorb", "dense", dtype="float32", tokenizer=tiny_tokenizer())
    return root


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(export, [str(part) for part in arguments])


def test_ast_export_merges_and_prints_the_cost(folder: Path, tmp_path: Path) -> None:
    options = ["--merge-adapter", folder / "lora", "--merge-text", folder / "text.txt"]
    result = run(folder / "base", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    assert "model.layers.*.mlp.down_proj  0." in result.stdout and "pruned (2:4)" in result.stdout
    assert "tokens: base " in result.stdout and ", adapter " in result.stdout and ", merged " in result.stdout
    expected, _ = merge_adapter_sparse(adapted(base()))
    record = read_json(tmp_path / "out" / "sparsity_config.json")
    assert record["merged_adapters"] == ["lora"] and record["pattern"] == "2:4"  # no absolute path
    found = load_causal_lm(tmp_path / "out", dtype="auto").state_dict()
    assert all(torch.equal(found[name], value.bfloat16()) for name, value in expected.state_dict().items())


def test_slorb_of_the_base_stays_beside_it(folder: Path, tmp_path: Path) -> None:
    result = run(folder / "with_slorb", tmp_path / "out", "--merge-adapter", folder / "lora", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "slorb" / "adapter_model.safetensors").is_file()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    start = masked_state(sparse_model(slorb_k=16), torch.float32)
    changed = {name for name, value in start.items() if not torch.equal(found[name], value)}
    assert len(changed) == 4 and all(torch.equal(found[name] == 0, value == 0) for name, value in start.items())


# arguments after MODEL and OUT -> what the one line says
ERRORS = {
    "slorb": (("--merge-adapter", "with_slorb/slorb"), "is SLoRB, which stands in for the pruned weights"),
    "none": (("--merge-adapter", "base"), "holds no adapter_config.json. Name the folder of a PEFT adapter."),
    "text": (("--merge-text", "text.txt"), "text.txt) has no effect without --merge-adapter"),
    "missing": (("--merge-adapter", "lora", "--merge-text", "no.txt"), "no.txt"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_wrong_input_is_one_line(case: str, folder: Path, tmp_path: Path) -> None:
    options, message = ERRORS[case]
    paths = [part if part.startswith("--") else folder / part for part in options]
    result = run(folder / "base", tmp_path / "out", *paths)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and message in result.stderr
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    export_model(base("gpt2"), tmp_path / "gpt2", "dense", dtype="float32")
    result = run(tmp_path / "gpt2", tmp_path / "out", "--merge-adapter", folder / "lora")
    assert result.exit_code == 2 and "cannot be loaded over this model" in result.stderr


@pytest.mark.parametrize("change", ["more", "fewer"])
def test_an_adapter_with_other_tensors_is_refused(change: str, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "lora", tmp_path / "lora")
    file = tmp_path / "lora" / "adapter_model.safetensors"
    first, others = {}, {}
    for name, value in load_file(file).items():
        (first if ".layers.0." in name else others)[name] = value
    added = (
        {name.replace(".0.", ".5."): value.clone() for name, value in first.items()} | first if change == "more" else {}
    )
    save_file(others | added, file)
    result = run(folder / "base", tmp_path / "out", "--merge-adapter", tmp_path / "lora")
    place = "has 'base_model.model.model.layers.5." if change == "more" else "lacks 'base_model.model.model.layers.0."
    assert result.exit_code == 2 and place in result.stderr and "(of 4 such tensors)" in result.stderr


def refused(model: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        merge_adapter_sparse(model)
    assert "\n" not in str(caught.value)


def test_other_models_are_refused(folder: Path) -> None:
    refused(base(), "Give a `peft.PeftModel`")
    refused(load_causal_lm(folder / "with_slorb"), "SLoRB must stay beside the model")
    refused(adapted(tiny_model()), "No layer of LlamaForCausalLM is 2:4")
    config = AstSparse24Config(dequantize=False)
    compressed = AutoModelForCausalLM.from_pretrained(folder / "base", quantization_config=config)
    refused(adapted(compressed), "compressed in memory. Load the base model without `dequantize=False`")
    head = LoraConfig(r=4, target_modules=["embed_tokens"])
    refused(get_peft_model(base(), head), "The adapter changes no 2:4 layer")
    prompt = PromptTuningConfig(task_type=peft.TaskType.CAUSAL_LM, num_virtual_tokens=2)
    refused(get_peft_model(base(), prompt), "The adapter changes no 2:4 layer")
    merged = adapted(base())
    merged.base_model.model.model.layers[0].self_attn.q_proj.merge()
    refused(merged, "merged into the weights already, without masks")
    dense = adapted(base())
    broken = next(parameter for name, parameter in dense.named_parameters() if "lora_A" in name)
    torch.nn.init.constant_(broken, torch.inf)
    refused(dense, "PEFT cannot merge this adapter: .*(NaN|finite)")
