"""The losses written plainly, and settings to try them with."""

import torch

from ast_sparse.config import DistillationConfig

CONFIGS = [
    None,
    DistillationConfig(alpha=0.67),
    DistillationConfig(alpha=1.0),
    DistillationConfig(alpha=0.0),
    DistillationConfig(ce_weight=1.0, kl_weight=0.5, temperature=2.0),
    DistillationConfig(kind="reverse_kl", alpha=0.5),
    DistillationConfig(kind="reverse_kl", ce_weight=0.3, kl_weight=2.0, temperature=3.0),
    DistillationConfig(kind="tinybert", alpha=0.5),
    DistillationConfig(kind="tinybert", ce_weight=0.3, kl_weight=2.0, temperature=3.0),
    DistillationConfig(kind="mobilebert", ce_weight=0.3, kl_weight=2.0, temperature=3.0),
    DistillationConfig(kind="squarehead", ce_weight=0.3, kl_weight=2.0, temperature=3.0),
]


def plain_loss(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, config: DistillationConfig | None):
    """Token by token, from the definitions, differentiable by autograd."""
    ce_weight, kl_weight = (1.0, 0.0) if config is None else config.weights
    t = 1.0 if config is None else config.temperature
    kind = "kl" if config is None else config.kind
    total = student.new_zeros(())
    for s, q, label in zip(student.flatten(0, -2), teacher.flatten(0, -2), labels.flatten(), strict=True):
        if label == -100:
            continue
        total = total - ce_weight * (s[label] - s.exp().sum().log())
        p_s, p_t = (s / t).softmax(0), (q / t).softmax(0)
        if kind == "reverse_kl":
            total = total + kl_weight * t**2 * (p_s * (p_s.log() - p_t.log())).sum()
        elif kind == "tinybert":
            total = total - kl_weight * (p_t * p_s.log()).sum()
        elif kind != "mobilebert":
            total = total + kl_weight * t**2 * (p_t * (p_t.log() - p_s.log())).sum()
    return total
