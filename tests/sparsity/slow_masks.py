"""A mask chosen group by group."""

import torch


def slow_mask(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Plain loops: sort each group by (score descending, column ascending), keep the first n."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for row in range(scores.shape[0]):
        for start in range(0, scores.shape[1], m):
            order = sorted(range(start, start + m), key=lambda column: (-float(scores[row, column]), column))
            mask[row, order[:n]] = True
    return mask
