"""scripts/counts on this code: masked products and the loss of a GPU stay within their goals; in the interpreter."""

import json

from scripts.benchmarks.traffic import LOSS_GOALS, PRODUCTS_GOAL
from tests.processes import run_interpreted

COUNT = """
import json, os
os.environ |= {"AST_SPARSE_CPU": "plain", "AST_SPARSE_GPU": "auto"}
from scripts.counts import cases

cases.as_on_gpu()
ways = [(accumulation, checkpointing) for accumulation in (1, 4) for checkpointing in (False, True)]
ratios = [cases.layer(True, *way)[0] / cases.layer(False, *way)[0] for way in ways]
found = {"products": ratios, "rows": cases.rows(True), "loss": cases.loss_counts("ours")}
os.environ["AST_SPARSE_GPU"] = "plain"
print(json.dumps({**found, "eager": cases.loss_counts("ours")}))
"""


def test_masked_products_and_the_loss_stay_within_their_goals() -> None:
    found = json.loads(run_interpreted(COUNT).stdout)
    assert len(found["products"]) == 4 and max(found["products"]) <= PRODUCTS_GOAL
    assert found["rows"] == 7  # float32 and mask read, 16 bits written
    assert found["loss"]["launches of Triton"] == 1 and found["loss"]["bytes a logit"] <= LOSS_GOALS["Triton"]
    assert found["loss"]["bytes a weight of the head and chunk"] < 0.1
    eager = found["eager"]  # of a GPU without Triton and without a compiler
    assert eager["launches of Triton"] == 0 and eager["bytes a logit"] <= 150
