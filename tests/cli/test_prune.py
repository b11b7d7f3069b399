"""ast-prune as a user calls it."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner, Result
from transformers import AutoModelForCausalLM

from ast_sparse.cli.eval import main as evaluate
from ast_sparse.cli.export import main as export
from ast_sparse.cli.prune import main
from ast_sparse.config import CalibrationConfig, SLoRBConfig, SparsityConfig
from ast_sparse.config.sparsity import Method
from ast_sparse.data.calibration import calibration_samples
from ast_sparse.sparsity.masks import Pattern
from ast_sparse.sparsity.model import select_layers, sparse_layers, sparsify_model
from ast_sparse.sparsity.oneshot import METHODS
from ast_sparse.storage.files import read_json
from ast_sparse.storage.load import load_causal_lm
from tests.data.bos_models import BOS, bos_tokenizer, save_bos_model
from tests.data.documents import cut, stream
from tests.hub_cache import OLDER, put_on_hub
from tests.models import generated_text, save_tiny_model

CALIBRATION = ("--samples", "4", "--seq-len", "16")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def text_for(method: Method, folder: Path) -> tuple[object, ...]:
    """Text for a method that reads some."""
    return ("--calibration", folder / "text.txt", *CALIBRATION) if METHODS[method].needs_text else ()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("prune")
    for family in ("llama", "gpt2"):
        save_tiny_model(root / family, family)
    (root / "text.txt").write_text(generated_text())
    return root


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_result_is_an_ordinary_checkpoint_that_is_exactly_sparse(
    family: str, method: Method, folder: Path, tmp_path: Path
) -> None:
    arguments = ("--method", method, "--dtype", "float32", *text_for(method, folder))
    result = run(folder / family, tmp_path / "out", *arguments)
    assert result.exit_code == 0, result.output
    assert f"Wrote {tmp_path / 'out'}" in result.stdout and "relative squared error" in result.stdout
    found, dense = load_causal_lm(tmp_path / "out"), load_causal_lm(folder / family)
    layers, _ = select_layers(found)
    for name, layer in layers.items():
        dim = 1 if isinstance(layer, torch.nn.Linear) else 0
        before = dense.get_parameter(f"{name}.weight")
        kept = layer.weight != 0
        assert Pattern(2, 4).holds(layer.weight, dim) and int(kept.sum()) * 2 == kept.numel()
        if method != "sparsegpt":  # which changes the kept weights
            assert torch.equal(layer.weight[kept], before[kept])
        if method == "magnitude":
            assert torch.equal(kept, Pattern(2, 4).mask(before.abs().movedim(dim, 1)).movedim(1, dim))
    recorded = read_json(tmp_path / "out" / "sparsity_config.json")
    assert (recorded["pattern"], recorded["one_shot"]["method"]) == ("2:4", method)


@pytest.mark.parametrize("pattern", ["1:2", "4:8", "unstructured"])
@pytest.mark.parametrize("method", METHODS)
def test_other_patterns_hold(pattern: str, method: Method, folder: Path, tmp_path: Path) -> None:
    arguments = ("--method", method, "--pattern", pattern, *text_for(method, folder))
    result = run(folder / "llama", tmp_path / "out", *arguments)
    assert result.exit_code == 0, result.output
    n, m = (1, 2) if pattern == "unstructured" else map(int, pattern.split(":"))
    layers, _ = select_layers(load_causal_lm(tmp_path / "out"))
    assert all(Pattern(n, m, pattern != "unstructured").holds(layer.weight) for layer in layers.values())


def test_result_can_be_measured_and_compressed(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(folder / "llama", out, "--method", "magnitude").exit_code == 0
    arguments = [str(out), "--dataset", str(folder / "text.txt"), "--seq-len", "16", "--limit", "2"]
    assert CliRunner().invoke(evaluate, arguments).exit_code == 0
    assert CliRunner().invoke(export, [str(out), str(tmp_path / "compressed")]).exit_code == 0


def test_the_same_seed_prunes_alike_and_another_calibrates_on_other_text(folder: Path, tmp_path: Path) -> None:
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        arguments = ("--method", "sparsegpt", "--calibration", folder / "text.txt", *CALIBRATION, "--seed", seed)
        assert run(folder / "llama", tmp_path / name, *arguments).exit_code == 0
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_damping_recovery_and_the_field_of_the_text_are_those_of_the_options(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text(json.dumps({"body": generated_text(), "text": "no"}) + "\n")
    arguments = ("--method", "sparsegpt", "--dtype", "float32", "--calibration", tmp_path / "text.jsonl", *CALIBRATION)
    options = ("--damping", "0.1", "--recovery-epochs", "2", "--recovery-learning-rate", "1e-3")
    more = ("--recovery-batch-size", "3", "--text-field", "body", "--device", "cpu")
    result = run(folder / "llama", tmp_path / "out", *arguments, *options, *more)
    assert result.exit_code == 0, result.output
    assert "before and after its recovery:\n  model.layers.0  " in result.stdout
    settings = CalibrationConfig(
        samples=4, seq_len=16, damping=0.1, recovery_epochs=2, recovery_learning_rate=1e-3, recovery_batch_size=3
    )
    blocks = [{"input_ids": block} for block in cut(stream([generated_text()]), 16)]
    samples = calibration_samples(blocks, settings)
    expected, found = (load_causal_lm(place) for place in (folder / "llama", tmp_path / "out"))
    sparsify_model(expected, SparsityConfig(init="sparsegpt"), calibration_config=settings, samples=samples)
    for name, layer in sparse_layers(expected).items():
        assert torch.equal(found.get_parameter(f"{name}.weight"), layer.masked_weight()), name


def test_a_rotated_model_is_pruned_and_says_what_was_gained(folder: Path, tmp_path: Path) -> None:
    arguments = ("--method", "magnitude", "--permute", "--rotation-steps", "2", "--calibration", folder / "text.txt")
    result = run(folder / "llama", tmp_path / "out", *arguments, *CALIBRATION)
    assert result.exit_code == 0, result.output
    assert "untied: 4,096 parameters more" in result.stdout
    assert "reordered  residual channels, MLP neurons, values in heads" in result.stdout
    layers, _ = select_layers(load_causal_lm(tmp_path / "out"))
    assert all(Pattern(2, 4).holds(layer.weight) for layer in layers.values())
    recorded = read_json(tmp_path / "out" / "sparsity_config.json")["one_shot"]
    assert (
        recorded["basis"]["permute"]
        and recorded["basis"]["rotation_steps"] == 2
        and recorded["calibration"]["samples"] == 4
    )


@pytest.mark.parametrize(("family", "method"), [("llama", "sparsegpt"), ("gpt2", "magnitude")])
def test_slorb_is_written_beside_the_model_and_loaded_with_it(
    family: str, method: Method, folder: Path, tmp_path: Path
) -> None:
    arguments = ("--method", method, *text_for(method, folder), "--slorb-k", "8")
    result = run(folder / family, tmp_path / "out", *arguments, "--dtype", "float32")
    assert result.exit_code == 0, result.output
    recorded = read_json(tmp_path / "out" / "sparsity_config.json")["one_shot"]["slorb"]
    assert recorded == {"k": 8, "init": "svd" if method == "sparsegpt" else "mean"}
    assert " --slorb-k 8\n" in (tmp_path / "out" / "README.md").read_text()
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.randint(0, 60, (4, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        dense, found, bare = (
            model(input_ids=tokens).logits
            for model in (load_causal_lm(folder / family), load_causal_lm(tmp_path / "out"), alone)
        )
        assert not torch.allclose(found, bare)
        if method == "sparsegpt":
            assert (found - dense).norm() < 0.95 * (bare - dense).norm()
        else:
            same = load_causal_lm(folder / family)
            sparsify_model(same, SparsityConfig(), SLoRBConfig(k=8))
            torch.testing.assert_close(found, same(input_ids=tokens).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("k", "said"), [("0", "--slorb-k=0 must be at least 1"), ("7", "--slorb-k=7 does not divide")])
def test_a_k_that_does_not_fit_names_the_option_and_leaves_nothing(
    k: str, said: str, folder: Path, tmp_path: Path
) -> None:
    result = run(folder / "llama", tmp_path / "out", "--method", "magnitude", "--slorb-k", k)
    assert result.exit_code == 2 and said in result.output and "slorb.k" not in result.output
    assert not (tmp_path / "out").exists()


def test_a_revision_on_the_hub_is_pruned_and_recorded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = save_tiny_model(tmp_path / "older", seed=1)
    name = put_on_hub(folder / "llama", tmp_path / "hub", monkeypatch, older)
    result = run(name, tmp_path / "out", "--method", "magnitude", "--dtype", "float32", "--revision", OLDER)
    assert result.exit_code == 0, result.output
    recorded = read_json(tmp_path / "out" / "sparsity_config.json")
    assert (recorded["base_commit"], recorded["one_shot"]["revision"]) == (OLDER, OLDER)
    dense = load_causal_lm(older).state_dict()
    for key, value in load_causal_lm(tmp_path / "out").state_dict().items():
        assert torch.equal(value, torch.where(value != 0, dense[key], 0)), key


def test_excluded_layers_stay_dense(folder: Path, tmp_path: Path) -> None:
    done = run(folder / "llama", tmp_path / "out", "--method", "magnitude", "--exclude", "down_proj")
    assert done.exit_code == 0 and "down_proj  (2): in --exclude\n" in done.output
    recorded = read_json(tmp_path / "out" / "sparsity_config.json")["one_shot"]
    assert recorded == {"method": "magnitude", "exclude": ["down_proj"]}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "OUT --method magnitude --pattern 2:4 --dtype bfloat16 --exclude down_proj\n" in card
    layers, _ = select_layers(load_causal_lm(tmp_path / "out"))
    dense = [name for name, layer in layers.items() if not Pattern(2, 4).holds(layer.weight)]
    assert dense and all(name.endswith("down_proj") for name in dense)


# arguments after MODEL and OUT -> what the one line says
ERRORS = {
    "unknown-method": (("--method", "magic"), "'magic' is not one of"),
    "no-method": ((), "Missing option '--method'"),
    "pattern-form": (("--method", "wanda", "--pattern", "2/4"), "--pattern='2/4' is not of the form N:M"),
    "pattern-values": (("--method", "wanda", "--pattern", "4:2"), "--pattern='4:2' needs 0 < N < M"),
    "pattern-width": (("--method", "wanda", "--pattern", "3:7"), "in_features=32 is not a multiple of 7"),
    "samples": (("--method", "wanda", "--samples", "0"), "--samples=0 must be at least 1"),
    "damping": (("--method", "sparsegpt", "--damping", "-1"), "--damping=-1.0 must be 0 or more"),
    "block-size": (("--method", "sparsegpt", "--block-size", "0"), "--block-size=0 must be at least 1"),
    "seq-len": (("--method", "wanda", "--seq-len", "1"), "--seq-len=1 must be at least 2 tokens"),
    "long-seq-len": (("--method", "wanda", "--seq-len", "100000"), "--seq-len=100000 is longer than the model's"),
    "no-text": (("--method", "wanda", "--calibration", "none.txt", "--seq-len", "8"), "`--calibration`: file none.txt"),
    "odd-name": (("--method", "wanda", "--calibration", "calibration.jsonl"), "file calibration.jsonl does not exist"),
    "short-text": (
        ("--method", "wanda", "--calibration", "TEXT", "--samples", "9999", "--seq-len", "16"),
        "fewer than --samples=9999 windows of 16",
    ),
    "one-short": (("--method", "wanda", "--calibration", "SHORT", "--seq-len", "64"), "fewer than one sequence of 64"),
    "device": (("--method", "magnitude", "--device", "gpu9"), "--device gpu9 cannot be used"),
    "no-groups": (("--method", "magnitude", "--permute", "--pattern", "unstructured"), "='unstructured' has no groups"),
    "rotation": (("--method", "magnitude", "--rotation-steps", "-1"), "--rotation-steps=-1 must be 0"),
    "text-for-none": (
        ("--method", "magnitude", "--calibration", "typo.jsonl"),
        "--calibration (typo.jsonl) has no effect without --method wanda or --method sparsegpt or --permute. Add",
    ),
    "no-rotation": (
        ("--method", "wanda", "--permute", "--damping", "0.1"),
        "--damping (0.1) has no effect without --method sparsegpt or --rotation-steps. Add",
    ),
    "no-hessian": (("--method", "wanda", "--block-size", "8"), "--block-size (8) has no effect without --method spars"),
    "no-recovery": (
        ("--method", "wanda", "--recovery-batch-size", "8"),
        "--recovery-batch-size (8) has no effect without --recovery-epochs. Add",
    ),
    "no-layer": (("--method", "magnitude", "--include", "nothing"), "'nothing'"),
    "no-model": (("--method", "magnitude", "MODEL"), "There is no folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_a_wrong_value_is_one_line_and_leaves_nothing_behind(case: str, folder: Path, tmp_path: Path) -> None:
    given, expected = ERRORS[case]
    (tmp_path / "short.txt").write_text("two of four")
    before = sorted(tmp_path.rglob("*"))
    model = tmp_path / "none" / "model" if "MODEL" in given else folder / "llama"
    names = {"TEXT": folder / "text.txt", "SHORT": tmp_path / "short.txt"}
    result = run(model, tmp_path / "out", *(names.get(part, part) for part in given if part != "MODEL"))
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line and not re.search(r"%\||examples/s", line)]
    assert len(lines) == 1 and lines[0].startswith("Error: ") and expected in lines[0], result.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_a_disk_without_room_is_refused_before_the_weights_are_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_causal_lm(folder / "llama")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=4 * model.num_parameters() - 1))
    result = run(folder / "llama", tmp_path / "out", "--method", "magnitude", "--dtype", "float32")
    assert result.exit_code == 2 and "GiB free, and the model needs about" in result.stderr
    assert result.stderr.count("\n") == 1 and not result.stdout and not list(tmp_path.iterdir())


def test_an_output_folder_in_use_is_refused_unless_overwritten(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(folder / "llama", out, "--method", "magnitude").exit_code == 0
    result = run(folder / "llama", out, "--method", "magnitude")
    assert result.exit_code == 2 and "--overwrite" in result.stderr
    assert run(folder / "llama", out, "--method", "magnitude", "--overwrite").exit_code == 0


def test_the_folder_of_a_gguf_file_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "llama", tmp_path / "model")
    (tmp_path / "model" / "model.gguf").write_bytes(b"GGUF")
    before = sorted((tmp_path / "model").iterdir())
    result = run(tmp_path / "model" / "model.gguf", tmp_path / "model", "--method", "magnitude", "--overwrite")
    assert result.exit_code == 2 and "holds the checkpoint that is being exported" in result.stderr
    assert sorted((tmp_path / "model").iterdir()) == before


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
@pytest.mark.parametrize("method", METHODS)
def test_zeros_of_a_sparse_model_stay_zero_if_asked(method: Method, pattern: str, folder: Path, tmp_path: Path) -> None:
    first = ("--method", "magnitude", "--pattern", "unstructured", "--dtype", "float32")
    assert run(folder / "llama", tmp_path / "sparse", *first).exit_code == 0
    calibration = (*text_for(method, folder), *(("--block-size", "8") if method == "sparsegpt" else ()))
    arguments = ("--method", method, "--pattern", pattern, "--dtype", "float32", *calibration)
    assert run(tmp_path / "sparse", tmp_path / "kept", *arguments, "--keep-zeros").exit_code == 0
    assert run(tmp_path / "sparse", tmp_path / "free", *arguments).exit_code == 0
    before, kept, free = (load_causal_lm(tmp_path / name) for name in ("sparse", "kept", "free"))
    revived = 0
    for name in select_layers(before)[0]:
        zeros = before.get_parameter(f"{name}.weight") == 0
        assert not kept.get_parameter(f"{name}.weight")[zeros].any()
        structured = pattern != "unstructured"
        assert Pattern(2 if structured else 1, 4 if structured else 2, structured).holds(
            kept.get_parameter(f"{name}.weight")
        )
        revived += int(free.get_parameter(f"{name}.weight")[zeros].count_nonzero())
    assert (revived > 0) == (method == "sparsegpt")
    recorded = read_json(tmp_path / "kept" / "sparsity_config.json")["one_shot"]
    assert not METHODS[method].needs_text or recorded["calibration"]["keep_zeros"] is True


@pytest.mark.parametrize("bos", ["auto", "none", "document", "window", "block"])
def test_calibration_text_has_bos_where_it_is_asked_for(bos: str, folder: Path, tmp_path: Path) -> None:
    model = save_bos_model(tmp_path / "model")
    arguments = ("--method", "wanda", "--calibration", folder / "text.txt", *CALIBRATION, "--bos", bos)
    result = run(model, tmp_path / "out", *arguments, "--dtype", "float32")
    assert result.exit_code == 0, result.output
    where = {"none": "none", "window": "<s> before each sequence", "block": "<s> before each sequence"}
    assert f"BOS: {where.get(bos, '<s> before each document')}" in result.stdout
    assert read_json(tmp_path / "out" / "sparsity_config.json")["one_shot"]["calibration"]["bos"] == bos
    ids = [*bos_tokenizer().encode(generated_text(), add_special_tokens=False), 0]
    if bos in ("auto", "document"):
        ids = [BOS, *ids]
    front, size = ([BOS], 15) if bos in ("window", "block") else ([], 16)
    blocks = [{"input_ids": front + ids[at : at + size]} for at in range(0, len(ids) - size + 1, size)]
    samples = calibration_samples(blocks, CalibrationConfig(samples=4, seq_len=16), tuple(front))
    expected = load_causal_lm(model)
    config = SparsityConfig(init="wanda")
    sparsify_model(expected, config, calibration_config=CalibrationConfig(samples=4), samples=samples)
    masks = {name: layer.mask for name, layer in sparse_layers(expected).items()}
    found = load_causal_lm(tmp_path / "out")
    assert all(torch.equal(found.get_parameter(f"{name}.weight") != 0, mask) for name, mask in masks.items())


def test_bos_that_the_tokenizer_lacks_is_refused(folder: Path, tmp_path: Path) -> None:
    result = run(
        folder / "llama", tmp_path / "out", "--method", "wanda", "--calibration", folder / "text.txt", "--bos", "window"
    )
    assert result.exit_code == 2 and not (tmp_path / "out").exists()
    assert "--bos='window': the tokenizer of" in result.stderr and "has no BOS token" in result.stderr
