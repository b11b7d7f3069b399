"""The files in configs/recipes, each with the published shape of its model and the number of devices it is for."""

from pathlib import Path
from typing import Any

from ast_sparse.config.yaml12 import read_yaml

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.yaml"))
SHAPES = ROOT / "tests" / "recipes"  # folders with a config.json, named as the model is on the hub


def read_recipe(recipe: Path) -> tuple[dict[str, Any], Path, int]:
    """The settings of a recipe, the folder with its model's config.json, and its number of devices."""
    settings = read_yaml(recipe)
    model = Path(settings["model"]["name_or_path"]).name
    shape = max((folder for folder in SHAPES.iterdir() if model.startswith(folder.name)), key=lambda it: len(it.name))
    return settings, shape, 8 if settings["training"].get("fsdp") else 1
