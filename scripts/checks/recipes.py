"""Does every recipe fit into GPUs of 80 GB? Plans each with its model's published shape, without a network; minutes.

python scripts/checks/recipes.py [RECIPE ...]    # hour, day, ...; default: all files in configs/recipes
"""

import re
import subprocess
import sys

from tests.planning.recipes import RECIPES, read_recipe

COMMAND = [sys.executable, "-m", "ast_sparse.cli.train", "--dry-run", "--device-memory", "80", "--output-dir", "unused"]


def main(names: list[str]) -> int:
    """Print tokens, time and memory of each recipe; the number of recipes that do not fit."""
    if unknown := {*names} - {recipe.stem for recipe in RECIPES}:
        sys.exit(f"There is no recipe {', '.join(sorted(unknown))} in configs/recipes.")
    failed = 0
    for recipe in RECIPES:
        if names and recipe.stem not in names:
            continue
        _, shape, devices = read_recipe(recipe)
        options = ["--config", str(recipe), "--world-size", str(devices), "--set", f"model.name_or_path={shape}"]
        done = subprocess.run([*COMMAND, *options], capture_output=True, text=True)
        kept = re.findall(r"^(?:tokens|time|memory|host| +total| +while models).*", done.stdout, flags=re.MULTILINE)
        print(recipe.stem, *kept, *(done.stderr.splitlines()[-1:] if done.returncode else []), "", sep="\n", flush=True)
        failed += done.returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
