"""Companion files and the spelling of a configuration, without the commands."""

import copy
import json
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from transformers import AutoConfig, Gemma3Config, GenerationConfig, LlamaConfig, Qwen2Config

from ast_sparse.errors import UserError
from ast_sparse.storage.companions import companion_files, copy_companions
from ast_sparse.storage.files import read_json
from ast_sparse.storage.load import load_causal_lm
from ast_sparse.storage.locate import load_model_config
from ast_sparse.storage.origin import Origin, check_saving, hub_commit, in_source_spelling, read_generation_config
from tests.hub_cache import COMMIT, put_on_hub
from tests.models import save_tiny_model, tiny_config, tiny_model


def written(config: Any, folder: Path) -> dict[str, Any]:
    config.save_pretrained(folder)
    return read_json(folder / "config.json")


OLD = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "num_attention_heads": 4,
    "rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}, "torch_dtype": "float16",
    "transformers_version": "4.30.0", "_name_or_path": "someone/else", "of_their_own": [1, 2], "temperature": 0.5,
    "use_cache": True,
}  # fmt: skip


def test_what_is_unchanged_keeps_the_spelling_of_the_source(tmp_path: Path) -> None:
    config = LlamaConfig.from_dict(dict(OLD))
    config.dtype, config.attention_dropout = "bfloat16", 0.1
    found = in_source_spelling(written(config, tmp_path), OLD, LlamaConfig)
    expected = {**OLD, "dtype": "bfloat16", "attention_dropout": 0.1}
    del expected["torch_dtype"], expected["_name_or_path"]
    assert found == expected


def test_a_changed_value_that_the_source_spells_otherwise_wins(tmp_path: Path) -> None:
    config = LlamaConfig.from_dict(dict(OLD))
    config.rope_parameters = {**config.rope_parameters, "rope_theta": 7000.0}
    saved = written(config, tmp_path)
    found = in_source_spelling(saved, OLD, LlamaConfig)
    assert LlamaConfig.from_dict(found).rope_parameters == config.rope_parameters


def test_a_configuration_inside_another_keeps_its_spelling_too(tmp_path: Path) -> None:
    inner = {"model_type": "gemma3_text", "hidden_size": 32, "head_dim": 8, "torch_dtype": "bfloat16", "theirs": 1}
    raw = {"model_type": "gemma3", "text_config": inner, "vision_config": {"hidden_size": 16, "theirs": 2}}
    config = Gemma3Config.from_dict(copy.deepcopy(raw))
    config.text_config.dtype, config.text_config.rms_norm_eps = "float32", 1e-3
    found = in_source_spelling(written(config, tmp_path), raw, Gemma3Config)
    del inner["torch_dtype"]
    assert found["text_config"] == {**inner, "dtype": "float32", "rms_norm_eps": 1e-3}
    assert found["vision_config"] == raw["vision_config"]


def test_another_kind_of_model_is_not_mixed_with_the_source(tmp_path: Path) -> None:
    saved = written(tiny_config("qwen2"), tmp_path)
    assert in_source_spelling(saved, OLD, Qwen2Config) == saved


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "qwen2", "mistral"])
def test_every_family_reads_alike_before_and_after(family: str, tmp_path: Path) -> None:
    raw = written(tiny_config(family), tmp_path / "raw")
    saved = written(AutoConfig.from_pretrained(tmp_path / "raw"), tmp_path / "saved")
    assert in_source_spelling(saved, raw, type(tiny_config(family))) == raw


def test_files_of_the_hub_s_cache_are_followed_to_their_blobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "models--org--tiny"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    save_tiny_model(tmp_path / "plain")
    (tmp_path / "plain" / "templates").mkdir()
    (tmp_path / "plain" / "templates" / "one.jinja").write_text("one")
    (tmp_path / "plain" / "generation_config.json").write_text('{"temperature":  0.5}')
    blobs.mkdir(parents=True)
    for number, path in enumerate(p for p in sorted((tmp_path / "plain").rglob("*")) if p.is_file()):
        link = snapshot / path.relative_to(tmp_path / "plain")
        link.parent.mkdir(parents=True, exist_ok=True)
        path.rename(blobs / str(number))
        link.symlink_to(blobs / str(number))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    model = tiny_model()
    model.config.name_or_path = "org/tiny"
    model.generation_config = GenerationConfig.from_pretrained(snapshot)
    origin = Origin.of(model)
    assert origin.folder == snapshot
    model.save_pretrained(tmp_path / "out")
    origin.complete(tmp_path / "out")
    assert (tmp_path / "out" / "templates" / "one.jinja").read_text() == "one"
    assert (tmp_path / "out" / "tokenizer.json").is_file() and not (tmp_path / "out" / "tokenizer.json").is_symlink()
    assert (tmp_path / "out" / "generation_config.json").read_text() == '{"temperature":  0.5}'


def test_the_commit_of_a_model_on_the_hub_is_known_but_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny_model(tmp_path / "model")
    name = put_on_hub(folder, tmp_path / "hub", monkeypatch)
    for config in (load_model_config(name), load_model_config(name, revision=COMMIT), load_causal_lm(name).config):
        assert hub_commit(config) == COMMIT
        assert COMMIT not in config.to_json_string()
    assert hub_commit(load_model_config(folder)) is None


@pytest.mark.parametrize("name", ["org/of-nobody", "/no/such/folder", "", "a b c"])
def test_a_model_from_nowhere_has_no_folder(name: str) -> None:
    model = tiny_model()
    model.config.name_or_path = name
    assert Origin.of(model).folder is None


def test_a_folder_without_a_configuration_is_no_origin(tmp_path: Path) -> None:
    (tmp_path / "thesis.pdf").write_text("beside a .gguf file")
    model = tiny_model()
    model.config.name_or_path = str(tmp_path)
    assert Origin.of(model).folder is None


def test_folders_that_lead_in_circles_end(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "one.txt").write_text("1")
    (tmp_path / "a" / "b" / "back").symlink_to(tmp_path / "a" / "b", target_is_directory=True)
    assert [str(path) for path in companion_files(tmp_path)] == ["a/one.txt"]


def test_dangling_links_are_left_out_and_links_within_become_files(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "LICENSE").write_text("free")
    (source / "COPYING").symlink_to(source / "LICENSE")
    (source / "gone").symlink_to(source / "nothing")
    copy_companions(source, tmp_path / "out")
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == dict.fromkeys(
        ("LICENSE", "COPYING"), "free"
    )
    assert not (tmp_path / "out" / "COPYING").is_symlink()


def test_a_linked_folder_outside_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret").write_text("secret")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "assets").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    with pytest.raises(UserError, match="outside its folder"):
        companion_files(tmp_path / "source")


def test_generation_settings_of_the_wrong_kind_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"max_new_tokens": -1}))
    with pytest.raises(UserError, match=r"Cannot read .*generation_config\.json`: .*max_new_tokens.*Correct"):
        read_generation_config(tmp_path)


def test_the_trial_leaves_its_objects_as_they_were() -> None:
    config = tiny_config("llama")
    before = config.to_dict()
    check_saving("x", config, GenerationConfig(do_sample=True, temperature=0.5))
    assert config.to_dict() == before
