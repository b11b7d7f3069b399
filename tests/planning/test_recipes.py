"""Every recipe is planned without a network: from a config.json of the model's published shape."""

import json
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoConfig, AutoModelForCausalLM

from ast_sparse.cli.train import main
from ast_sparse.planning.passes import Passes, Peak
from tests.planning.recipes import RECIPES, SHAPES, read_recipe

PARAMETERS = {  # as the model cards, or the index of the weights, say
    "Llama-2-7b-hf": 6_738_415_616,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.2-1B": 1_235_814_400,
    "Mistral-7B-v0.3": 7_248_023_552,
    "Qwen3-0.6B-Base": 596_049_920,
    "Qwen3-1.7B-Base": 1_720_574_976,
    "Qwen3-8B-Base": 8_190_735_360,
    "SmolLM2-135M": 134_515_008,
    "SmolLM3-3B-Base": 3_075_098_624,
    "gemma-3-1b-pt": 999_885_952,
}


def test_shapes_have_the_published_numbers_of_parameters() -> None:
    found = {}
    for folder in SHAPES.iterdir():
        with torch.device("meta"):
            found[folder.name] = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).num_parameters()
    assert found == PARAMETERS


def test_recipes_of_gemma_put_bos_before_each_block() -> None:
    found = {}
    for recipe in RECIPES:
        settings, shape, _ = read_recipe(recipe)
        if json.loads((shape / "config.json").read_text())["model_type"].startswith("gemma"):
            found[recipe.stem] = settings["data"].get("bos")
    assert found == {"gemma3_1b": "block"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_planned(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two of its model's blocks and no passes, which take seconds: `scripts/checks/recipes.py` plans all of it."""
    monkeypatch.setattr(Passes, "_run", lambda *args, **kwargs: Peak())
    settings, shape, devices = read_recipe(recipe)
    config = json.loads((shape / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    options = ["--world-size", str(devices), "--device-memory", "80", "--set", f"model.name_or_path={tmp_path}"]
    arguments = ["--config", str(recipe), "--output-dir", str(tmp_path / "out"), "--dry-run", *options]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    steps, sequences, length = map(int, re.findall(r"(\d+) steps x (\d+) sequences x (\d+)\s", recipe.read_text())[0])
    assert f"tokens: {steps:,} steps x {sequences * length:,} tokens per step" in result.stdout
    assert f" = {sequences:,} sequences per step" in result.stdout and "  total  " in result.stdout
    assert (length, steps) == (settings["data"]["block_size"], settings["training"]["max_steps"])
