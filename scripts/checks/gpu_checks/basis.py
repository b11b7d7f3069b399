"""Check 14: a model computes the same in a new basis, whether it is on the device or only its blocks are."""

import traceback
from collections.abc import Iterator

import torch

from ast_sparse.basis.change import BasisReport, change_basis
from ast_sparse.config import BasisConfig
from ast_sparse.sparsity.masks import Pattern
from scripts.checks.gpu_checks.bench import Bench, Line, right
from scripts.checks.gpu_checks.shapes import new_model, token_ids

_CONFIG = BasisConfig(permute=True, rotation_steps=2)
_LOGITS, _SHARES = 1e-4, 1e-3
_CPU = torch.device("cpu")


def basis(bench: Bench) -> Iterator[Line]:
    """Channels of a tiny LLaMA are reordered and rotated; one way that fails does not stop the other."""
    expected = _changed(_CPU, None).shares
    ways: dict[str, tuple[torch.device, torch.device | None]] = {
        "model on the CPU, blocks on the device": (_CPU, bench.device),
        "model on the device": (bench.device, None),
    }
    for case, (home, device) in ways.items():
        try:
            found = _changed(home, device)
        except Exception as error:
            traceback.print_exc()
            yield {"case": case, "verdict": "failed", "reason": f"{type(error).__name__}: {error}"[:1000]}
            continue
        apart = max(abs(found.shares[stage] - share) for stage, share in expected.items())
        is_right = found.logit_error <= _LOGITS and apart <= _SHARES
        limits = f"logits <= {_LOGITS:g} of the largest, shares <= {_SHARES:g} from the CPU's"
        yield right(case, is_right, limits, logits=found.logit_error, apart=apart, shares=found.shares)


def _changed(home: torch.device, device: torch.device | None) -> BasisReport:
    """The change of the same random model, which is at `home`; its blocks run on `device`, or there."""
    model = new_model("tiny")
    with torch.no_grad():
        for parameter in model.parameters():  # the gains of its norms are 1
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return change_basis(model.to(home), _CONFIG, Pattern(2, 4), token_ids("tiny", 4, 32), device=device)
