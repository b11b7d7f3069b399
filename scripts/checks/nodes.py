"""What the checks on two nodes train, and how they compare two runs.

nodes.py prepare FOLDER      a tiny model, a text and run.yaml
nodes.py compare RUN RUN     whether weights and mask refreshes are the same, bit for bit
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.models import generated_text, save_tiny_model

CONFIG = """
model: {{name_or_path: {root}/model}}
data: {{train: {root}/text.txt, eval_share: 0.1, block_size: 32}}
sparsity: {{mask_interval: 10, mask_decay: 1e-2}}
slorb: {{k: 16}}
training:
  output_dir: {root}/unnamed
  max_steps: 80
  per_device_train_batch_size: 2
  learning_rate: 1e-3
  logging_steps: 20
  save_steps: 20
  save_total_limit: 2
  use_cpu: true
  report_to: none
  disable_tqdm: true
evaluation: {{windows: 2}}
"""


def prepare(root: Path) -> None:
    save_tiny_model(root / "model")
    (root / "text.txt").write_text(generated_text(400))
    (root / "run.yaml").write_text(CONFIG.format(root=root))


def compare(one: Path, two: Path) -> bool:
    """Whether two runs ended with the same bits; print what was compared."""
    first, second = (load_file(run / "model.safetensors") for run in (one, two))
    layers = json.loads((one / "sparsity_config.json").read_text())["layers"]
    kept = [second[f"{layer}.weight"].ne(0) for layer in layers]
    same = first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    rows = [(run / "mask_history.jsonl").read_text().splitlines() for run in (one, two)]
    same &= rows[0] == rows[1] and len(rows[0]) > 0
    pruned = all(float(mask.float().mean()) == 0.5 for mask in kept)
    print(
        f"{two.name}: {len(first)} tensors, {len(kept)} pruned layers 2:4 and {len(rows[0])} rows of mask refreshes: "
        + ("the bits of the undisturbed run" if same and pruned else "DIFFERENT from the undisturbed run")
    )
    return same and pruned


if __name__ == "__main__":
    task, *paths = sys.argv[1:]
    if task == "prepare":
        prepare(Path(paths[0]))
    else:
        sys.exit(not compare(*map(Path, paths)))
