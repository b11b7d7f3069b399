"""The card of every kind of export, as its reader, the hub and a careful owner see it."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import gguf
import huggingface_hub
import peft
import pytest
import torch
import yaml
from click.testing import CliRunner
from huggingface_hub import ModelCard, metadata_load
from transformers import AutoModelForCausalLM

import ast_sparse
from ast_sparse.cli import export, prune, train
from ast_sparse.export.card_subject import Subject, shareable, with_run
from ast_sparse.export.export import export_model
from ast_sparse.export.model_card import write_card
from ast_sparse.export.slorb_hint import VLLM_RANKS
from ast_sparse.storage.base_card import base_metadata
from ast_sparse.storage.files import read_json, write_json
from ast_sparse.storage.sparsity_record import SparsityRecord
from tests.export.sparse_models import plain_sparse_model, sparse_model, token_ids
from tests.models import generated_text, save_tiny_model
from tests.training.small_runs import blocks, trainer

BASE_CARD = "---\nlicense: apache-2.0\nlanguage:\n- en\nbase_model: org/grandparent\ntags: [chat]\n---\n# Tiny\n"


def call(command: object, *arguments: object) -> None:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])  # type: ignore[arg-type]
    assert result.exit_code == 0, result.output


def card(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def row(text: str, name: str) -> str:
    (found,) = re.findall(rf"^\| {re.escape(name)} \| (.*) \|$", text, re.MULTILINE)
    return str(found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model with a card, a run with SLoRB from it, and a compressed export of the run."""
    folder = tmp_path_factory.mktemp("cards")
    save_tiny_model(folder / "tiny")
    (folder / "tiny" / "README.md").write_text(BASE_CARD)
    (folder / "text.txt").write_text(generated_text(300))
    tree = {
        "model": {"name_or_path": str(folder / "tiny")},
        "data": {"root": str(folder), "train": "text.txt", "block_size": 32, "eval_share": 0.1},
        "sparsity": {"mask_interval": 1},
        "slorb": {"k": 8},
        "training": {
            "max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 3e-3,
            "save_steps": 2, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "hub_token": "hf_secret",
        },
        "evaluation": {"datasets": ["heldout", str(folder / "text.txt")], "seq_len": 32, "windows": 3},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    call(train.main, "--config", folder / "run.yaml", "--output-dir", folder / "run")
    call(export.main, folder / "run", folder / "out")
    return folder


def test_metadata_is_what_the_hub_reads(folder: Path) -> None:
    found = metadata_load(folder / "out" / "README.md")
    assert found == {
        "license": "apache-2.0", "language": ["en"], "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["ast_sparse", "sparse", "2:4"],
    }  # fmt: skip
    assert str(ModelCard.load(folder / "out" / "README.md")) == card(folder / "out")


def test_every_stage_has_the_perplexities_that_the_run_recorded(folder: Path) -> None:
    results = read_json(folder / "run" / "results.json")
    assert list(results) == ["dense", "one-shot 2:4", "retrained 2:4", "retrained 2:4 without SLoRB"]
    shown = ["dense", "one-shot 2:4", "**retrained 2:4 with SLoRB**", "retrained 2:4 without SLoRB"]
    for name, stage in zip(shown, results.values(), strict=True):
        assert row(card(folder / "out"), name) == " | ".join(f"{each['perplexity']:.2f}" for each in stage.values())
    assert "- `text.txt`: 3 windows of 32 tokens; the text has" in card(folder / "out")
    assert "float32 weights, before they were rounded to bfloat16" in card(folder / "out")


def test_steps_and_tokens_are_those_of_the_exported_weights(folder: Path) -> None:
    assert row(card(folder / "out"), "trained") == f"4 steps, {4 * 2 * 2 * 32:,} tokens"
    call(export.main, folder / "run" / "checkpoint-2", folder / "earlier")
    text = card(folder / "earlier")
    assert row(text, "trained") == f"2 steps, {2 * 2 * 2 * 32:,} tokens"
    assert "None is recorded." in text and "retrained 2:4 with" not in text


def test_a_trainer_writes_what_it_knows(tmp_path: Path) -> None:
    args = dict(max_steps=3, save_steps=1, save_strategy="steps", eval_strategy="steps", eval_steps=1)
    best = dict(load_best_model_at_end=True, learning_rate=10.0, greater_is_better=True)  # it is step 2 of 3
    for name, more in (("last", {}), ("best", best)):
        run = trainer(tmp_path / f"{name}-run", args=args | more, eval_dataset=blocks(4, seed=1))
        run.train()
        run.export(tmp_path / name, "dense")
    text = card(tmp_path / "last")
    assert row(text, "trained") == f"3 steps, {3 * 4 * 16:,} tokens"
    assert 'trainer.export("OUT", format="dense", dtype="bfloat16")' in text and "mask_interval: 2" in text
    assert row(card(tmp_path / "best"), "trained") == f"{run.state.best_global_step} steps"
    assert run.state.best_global_step < 3


def test_base_and_sizes_are_in_the_facts(folder: Path) -> None:
    text = card(folder / "out")
    assert row(text, "base model") == "`tiny`" and row(text, "licence") == "`apache-2.0`, that of the base model"
    assert row(text, "pruned") == "2:4, 14 linear layers; 50.0% of 15,360 weights are not zero"
    report = export_model(folder / "run", folder / "again")
    size = (folder / "again" / "model.safetensors").stat().st_size
    tensors = sum(each.stored_bytes for each in report.rows[:-1] if each.section != "SLoRB")
    assert tensors == 25_792 and 0 < size - tensors < 4_000  # the header
    assert row(text, "weights") == "bfloat16, 25.79 kB; without compression 39.23 kB"
    assert report.files["README.md"] == len(card(folder / "again").encode())
    assert card(folder / "again") == text  # the same text for the same input, whatever the folder is called


def test_nothing_private_is_published(folder: Path) -> None:
    for path in (folder / "out" / "README.md", folder / "out" / "sparsity_config.json"):
        content = path.read_text()
        assert str(folder) not in content and "hf_secret" not in content and "text.txt" in content
    assert "hf_secret" in (folder / "run" / "config.yaml").read_text()
    assert [shareable(name) for name in ("/a/b", "~/b", "../x/b", "a/b", "org/name")] == [
        "b",
        "b",
        "b",
        "a/b",
        "org/name",
    ]


def test_no_part_of_a_record_has_a_path_of_this_machine(tmp_path: Path) -> None:
    record = {"base_model": "/a/tiny", "one_shot": {"method": "wanda", "calibration": {"data": ("/a/b.txt",)}}}
    export_model(sparse_model(), tmp_path / "out", record=record)
    written = read_json(tmp_path / "out" / "sparsity_config.json")
    assert written["base_model"] == "tiny" and written["one_shot"]["calibration"]["data"] == ["b.txt"]
    write_json(tmp_path / "out" / "sparsity_config.json", {**written, **record, "slorb": None})  # of an older version
    export_model(tmp_path / "out", tmp_path / "again")
    assert "/a/" not in (tmp_path / "again" / "sparsity_config.json").read_text()


def test_the_code_of_the_card_runs(folder: Path) -> None:
    first, second = re.findall(r"```python\n(import ast_sparse.*?|model = .*?)```", card(folder / "out"), re.DOTALL)
    names: dict[str, object] = {}
    exec(first.replace("FOLDER", str(folder / "out")), names)
    expected = ast_sparse.load_causal_lm(str(folder / "out"), dtype="auto").eval()(token_ids()).logits
    assert torch.equal(names["model"].eval()(token_ids()).logits, expected)  # type: ignore[attr-defined]
    exec(second.replace("FOLDER", str(folder / "out")), names)
    plain = AutoModelForCausalLM.from_pretrained(folder / "out").eval()(token_ids()).logits
    assert torch.equal(names["model"].eval()(token_ids()).logits, plain)  # type: ignore[attr-defined]
    assert not torch.equal(plain, expected)


def test_the_package_is_installed_from_a_checkout(folder: Path) -> None:
    text = card(folder / "out")
    assert "checkout of its repository: `pip install CHECKOUT`" in text and "\npip install CHECKOUT  #" in text
    assert "pip install ast" not in text


def test_settings_of_the_run_can_be_read_back(folder: Path) -> None:
    (settings,) = re.findall(r"```yaml\n(.*?)```", card(folder / "out"), re.DOTALL)
    before, after = yaml.safe_load((folder / "run.yaml").read_text()), yaml.safe_load(settings)
    assert after["model"]["name_or_path"] == "tiny" and after["slorb"]["k"] == 8
    assert after["training"].items() >= {key: before["training"][key] for key in ("max_steps", "learning_rate")}.items()
    assert "ast-train --config run.yaml" in card(folder / "out")
    assert "ast-export run OUT --format compressed --dtype bfloat16" in card(folder / "out")


def test_the_card_of_the_base_is_kept_under_another_name(folder: Path, tmp_path: Path) -> None:
    assert (folder / "out" / "SOURCE_README.md").read_text() == BASE_CARD
    assert "[SOURCE_README.md](SOURCE_README.md)" in card(folder / "out")
    call(export.main, folder / "out", tmp_path / "again", "--format", "dense")  # an export of an export
    assert (tmp_path / "again" / "SOURCE_README.md").read_text() == BASE_CARD
    first, second = card(folder / "out"), card(tmp_path / "again")
    assert first[first.index("## Perplexity") : first.index("## How")] in second
    assert metadata_load(tmp_path / "again" / "README.md") == metadata_load(folder / "out" / "README.md")


def test_other_weights_do_not_get_the_card_of_an_export(folder: Path, tmp_path: Path) -> None:
    call(prune.main, folder / "tiny", tmp_path / "pruned", "--method", "magnitude")
    text = card(tmp_path / "pruned")
    assert "pruned to 2:4 sparsity in one shot (magnitude)" in text and "ast-prune tiny OUT --method magnitude" in text
    call(export.main, folder / "run", tmp_path / "dense", "--format", "dense")
    (tmp_path / "dense" / "slorb").rename(tmp_path / "slorb")
    record = read_json(tmp_path / "dense" / "sparsity_config.json")
    write_json(tmp_path / "dense" / "sparsity_config.json", {**record, "slorb": None})
    call(prune.main, tmp_path / "dense", tmp_path / "other", "--method", "magnitude", "--pattern", "1:4")
    assert "retrained 2:4" not in card(tmp_path / "other") and "None is recorded." in card(tmp_path / "other")
    assert (tmp_path / "other" / "SOURCE_README.md").read_text() == BASE_CARD


def test_the_command_that_pruned_a_model_has_all_options_that_chose_weights(tmp_path: Path) -> None:
    made = {
        "method": "wanda", "include": ["*.q_proj", "up"], "revision": "v1", "gguf_file": "m.gguf",
        "calibration": {"keep_zeros": True},
    }  # fmt: skip
    export_model(sparse_model(), tmp_path / "out", record={"base_model": "tiny", "one_shot": made})
    expected = "ast-prune tiny OUT --method wanda --pattern 2:4 --dtype bfloat16 --revision v1 --gguf-file m.gguf"
    assert f"{expected} --include '*.q_proj' --include up --keep-zeros\n" in card(tmp_path / "out")
    export_model(tmp_path / "out", tmp_path / "again", "dense", dtype="float32")
    command = expected.replace(" --dtype bfloat16", "")
    assert f"{command} --include '*.q_proj' --include up --keep-zeros\nast-export out OUT" in card(tmp_path / "again")


def test_a_folder_without_a_record_keeps_what_its_card_says(tmp_path: Path) -> None:
    model = plain_sparse_model()
    source = tmp_path / "a | `b` # 'c': 2"
    model.save_pretrained(source)
    (source / "README.md").write_text("---\nlicense: other\nlicense_name: 'own: x'\nbase_model: org/dense\n---\n")
    (source / "LICENSE.txt").write_text("terms")
    export_model(source, tmp_path / "out")
    found = metadata_load(tmp_path / "out" / "README.md")
    assert found is not None and found["base_model"] == "org/dense" and found["license_name"] == "own: x"
    text = card(tmp_path / "out")
    assert row(text, "licence") == "`own: x`, as the card of the source says; see [LICENSE.txt](LICENSE.txt)"
    assert "# a \\| \\`b\\` \\# 'c': 2 with 2:4 sparsity" in text and "How it was made sparse is not recorded." in text
    assert """ast-export 'a | `b` # '"'"'c'"'"': 2' OUT --format compressed""" in text


def test_what_is_unknown_is_said(tmp_path: Path) -> None:
    export_model(sparse_model("llama", pattern="unstructured"), tmp_path / "out", "dense", dtype="float32")
    text, found = card(tmp_path / "out"), metadata_load(tmp_path / "out" / "README.md")
    assert row(text, "base model") == "not recorded" and row(text, "licence").startswith("unknown: none was found.")
    assert found is not None and found["license"] == "unknown" and "base_model" not in found
    assert found["tags"][-1] == "unstructured" and "neighbouring" not in text and "pip install" not in text
    assert 'export_model(model, "OUT", format="dense", dtype="float32")' in text
    plain_sparse_model().save_pretrained(tmp_path / "plain")
    (tmp_path / "plain" / "LICENSE").write_text("terms")
    export_model(tmp_path / "plain", tmp_path / "licensed")
    found = metadata_load(tmp_path / "licensed" / "README.md")
    assert found is not None and (found["license"], found["license_link"]) == ("other", "LICENSE")


def test_only_a_model_that_came_from_the_hub_is_linked_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "hub" / "models--org--tiny"
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "snapshots" / "abc" / "README.md").write_text("---\nlicense: mit\n---\n")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for commit in ("abc", None):
        record = {"base_model": "org/tiny", "base_commit": commit, "sparsity": {"pattern": "2:4", "init": "wanda"}}
        record |= {"trained": {"steps": 3 if commit else 0, "tokens": 0}}
        export_model(sparse_model(), tmp_path / f"out-{commit}", record=record)
    found = metadata_load(tmp_path / "out-abc" / "README.md")
    assert found is not None and found["base_model"] == "org/tiny" and found["license"] == "mit"
    assert "[org/tiny](https://huggingface.co/org/tiny), retrained" in card(tmp_path / "out-abc")
    found = metadata_load(tmp_path / "out-None" / "README.md")
    assert found is not None and "base_model" not in found and "huggingface.co" not in card(tmp_path / "out-None")
    assert "pruned to 2:4 sparsity in one shot (wanda)" in card(tmp_path / "out-None")


def test_random_weights_have_no_base_model() -> None:
    run = {"config": {"model": {"name_or_path": "org/tiny", "random_weights": True}}}
    record = SparsityRecord({"base_model": "org/tiny", "base_commit": "abc", "run": run})
    subject = Subject(
        record=record,
        folder=None,
        origin=None,
        name="org/tiny",
        commit="abc",
        has_conv1d=False,
        model_type="llama",
        ranks={},
    )
    assert subject.base_id is None and subject.base == "org/tiny"
    del run["config"]["model"]["random_weights"]
    assert subject.base_id == "org/tiny"


def test_the_licence_of_a_gguf_file_is_read(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_license("apache-2.0")
    writer.add_languages(["en"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for name in ("m.gguf", ""):
        assert base_metadata(str(tmp_path / name), None) == {"license": "apache-2.0", "language": ["en"]}
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert base_metadata(str(tmp_path / "m.gguf"), None) == {}


@pytest.mark.parametrize("rank", [1, 6, 16, 321, 512, 513, 688])
def test_vllm_is_given_the_smallest_rank_that_it_takes(rank: int, folder: Path, tmp_path: Path) -> None:
    report = export_model(folder / "run", tmp_path / "out")
    record = SparsityRecord.read(tmp_path / "out")
    subject = Subject(
        record=record,
        folder=None,
        origin=None,
        name="x",
        commit=None,
        has_conv1d=False,
        model_type="llama",
        ranks={"a": 1, "b": rank},
    )
    write_card(tmp_path / "out", subject, report)
    taken = re.findall(r"--max-lora-rank (\d+)", card(tmp_path / "out"))
    expected = {1: "1", 6: "8", 16: "16", 321: "512", 512: "512"}
    assert taken == ([expected[rank]] if rank in expected else [])
    in_layers = "vllm serve FOLDER --hf-overrides '{\"ast_sparse_slorb\": true}'"
    assert (in_layers in card(tmp_path / "out")) == (rank > VLLM_RANKS[-1])
    write_card(tmp_path / "out", subject, replace(report, format="dense"))
    assert (f"rank {rank}, and vLLM's LoRA takes at most 512" in card(tmp_path / "out")) == (rank > VLLM_RANKS[-1])
    write_card(tmp_path / "out", replace(subject, has_conv1d=True), report)
    assert "vllm serve" not in card(tmp_path / "out")  # compressed layers of GPT-2
    write_card(tmp_path / "out", replace(subject, model_type="mixtral"), report)
    assert "vllm serve" not in card(tmp_path / "out")
    assert "it is a mixtral model, whose experts a compressed export stores under names" in card(tmp_path / "out")
    write_card(tmp_path / "out", replace(subject, model_type="mixtral"), replace(report, format="dense"))
    assert "vllm serve FOLDER" in card(tmp_path / "out")


def test_an_export_whose_adapter_was_removed_is_the_model_without_it(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "slorb")
    record = read_json(tmp_path / "run" / "sparsity_config.json")
    write_json(tmp_path / "run" / "sparsity_config.json", {**record, "slorb": False})
    export_model(tmp_path / "run", tmp_path / "out")
    text = card(tmp_path / "out")
    assert row(text, "**retrained 2:4 without SLoRB**") and row(text, "retrained 2:4 with SLoRB")
    assert "load_adapter" not in text and "--enable-lora" not in text


def test_rounding_to_4_bits_is_said_and_the_perplexities_of_the_run_are_not_its_own(
    folder: Path, tmp_path: Path
) -> None:
    options = ("--calibration", folder / "text.txt", "--samples", 4, "--seq-len", 16, "--device", "cpu")
    call(export.main, folder / "run", tmp_path / "awq", "--format", "compressed-int4", *options)
    text = card(tmp_path / "awq")
    assert row(text, "weights").startswith("4-bit values in pruned layers, else bfloat16, ")
    assert row(text, "rounding").startswith("pruned weights to 4 bits by AWQ on 4 sequences of 16 tokens; it scales")
    assert "float32 weights, before the pruned ones were rounded to 4 bits." in text
    assert "none of these is the perplexity of this export" in text and row(text, "retrained 2:4 with SLoRB")
    assert "--format compressed-int4 --dtype bfloat16 --calibration TEXT --samples 4 --seq-len 16\n" in text
    rounding = {"method": "awq", "bits": 4, "sequences": 4, "seq_len": 16}
    assert read_json(tmp_path / "awq" / "sparsity_config.json")["rounding"] == rounding
    call(export.main, tmp_path / "awq", tmp_path / "dense", "--format", "dense")  # its weights were rounded too
    assert row(card(tmp_path / "dense"), "rounding") == row(text, "rounding")
    assert "none of these" in card(tmp_path / "dense") and "--calibration" not in card(tmp_path / "dense")
    call(export.main, tmp_path / "awq", tmp_path / "again", "--format", "compressed-int4", "--calibration", "none")
    before = row(card(tmp_path / "again"), "rounding")
    assert before == f"pruned weights to the nearest step of 4 bits, without text; before that {row(text, 'rounding')}"
    assert "--calibration none\n" in card(tmp_path / "again")


def test_after_a_merge_no_perplexity_of_the_run_is_that_of_the_export(folder: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder / "out")
    lora = peft.LoraConfig(r=4, target_modules=["up_proj"], init_lora_weights=False)
    peft.get_peft_model(base, lora).save_pretrained(str(tmp_path / "lora"))
    call(export.main, folder / "run", tmp_path / "merged", "--merge-adapter", tmp_path / "lora")
    text = card(tmp_path / "merged")
    assert row(text, "merged adapters") == "`lora`, under the masks" and row(text, "retrained 2:4 with SLoRB")
    assert "float32 weights, before an adapter was merged into them." in text and "none of these is" in text
    assert "--dtype bfloat16 --merge-adapter lora\n" in text and str(tmp_path) not in text


def test_data_sets_of_one_name_stay_apart(tmp_path: Path) -> None:
    result = {"perplexity": 2.0, "seq_len": 4, "windows": 1, "predicted_tokens": 3, "total_tokens": 4}
    write_json(tmp_path / "results.json", {"dense": {"/a/x.txt": result, "/b/x.txt": {**result, "perplexity": 3.0}}})
    (tmp_path / "config.yaml").write_text("evaluation: {prompts: [a]}\ndata: {train: [{path: x, token: secret}]}\n")
    (tmp_path / "metrics.jsonl").write_text("")
    record = with_run(SparsityRecord(), tmp_path)
    found = {name: each["perplexity"] for name, each in record.get("run", "results", "dense").items()}
    assert found == {"x.txt": 2.0, "x.txt (2)": 3.0}
    assert record.get("run", "config") == {"evaluation": {}, "data": {"train": [{"path": "x"}]}}


def test_a_damaged_record_of_a_run_is_left_out(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    results = folder / "run" / "results.json"
    content = results.read_text()
    try:
        results.write_text(json.dumps({"dense": {"text.txt": 3}}))
        export_model(folder / "run", tmp_path / "out")
    finally:
        results.write_text(content)
    assert "None is recorded." in card(tmp_path / "out") and row(card(tmp_path / "out"), "trained").startswith(
        "4 steps"
    )
