"""SparseAdamW: AdamW with a decay on pruned weights, by placement (paper Sec. 3.2 and 6.6).

Each placement is one pure update function in `kernels/updates.py`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from ast_sparse.distributed.pieces import local
from ast_sparse.kernels import moments8bit
from ast_sparse.kernels.choice import Kernels
from ast_sparse.kernels.updates import PLACEMENTS, StepValues, update_weights


class SparseAdamW(torch.optim.Optimizer):
    """AdamW that decays the pruned weights of masked parameters.

    Parameters with a bound mask are updated according to `decay_placement`; all others as in `torch.optim.AdamW`. λ is
    the value `mask_decay` of a group and may change between steps. State: `step`, `exp_avg`, `exp_avg_sq`.

    Args:
        params: parameters or groups; a group may set any value below, and `is_masked: True` if each of its
            parameters must have a mask.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
        mask_decay: λ of (3).
        decay_placement: `momentum` (20)-(23), `gradient` (18)-(19) or `weight` (16)-(17). Under `weight`, λ·γ is often
            below the rounding of float32 (6e-5 · 2e-5 ≈ 1e-9 of the weight), and then the decay has no effect.
        decay_norm: `l2` decays pruned weights by λ·W as in (3), `l1` by λ·sign(W) in the same place (paper Sec. 12).
            Under `l1` a weight near 0 swings around it, by at most a step.
        moments: `8bit` keeps the moments of masked groups in 8 bits (`kernels/moments8bit.py`, needs torchao). Those of
            all other parameters stay in float32: gradients of an embedding are often 0, and a second moment that is
            rounded to 0 makes the next step far too large.

    Attributes:
        kernels: `compiled` or `eager`, for the masked parameters; it may be changed before any step.

    Raises:
        ValueError: a value out of range, or an unknown placement.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        mask_decay: float = 0.0,
        decay_placement: str = "momentum",
        moments: Literal["float32", "8bit"] = "float32",
        decay_norm: Literal["l2", "l1"] = "l2",
    ) -> None:
        if decay_placement not in PLACEMENTS:
            raise ValueError(f"decay_placement={decay_placement!r} is unknown. Use one of {', '.join(PLACEMENTS)}.")
        if decay_norm not in ("l2", "l1"):
            raise ValueError(f"decay_norm={decay_norm!r} is unknown. Use l2 or l1.")
        for name, value in dict(lr=lr, eps=eps, weight_decay=weight_decay, mask_decay=mask_decay).items():
            if not value >= 0:
                raise ValueError(f"{name}={value} must be 0 or more.")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={betas} must lie in [0, 1).")
        defaults = dict(
            lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, mask_decay=mask_decay,
            decay_placement=decay_placement, is_masked=False,
        )  # fmt: skip
        if decay_norm != "l2":  # otherwise without the entry, as in the groups of older checkpoints
            defaults["decay_norm"] = decay_norm
        super().__init__(params, defaults)
        self._masks: dict[Tensor, Tensor] = {}
        self._in_8bit: set[Tensor] = set()
        if moments == "8bit":
            moments8bit.allow_loading()
            masked = (p for group in self.param_groups if group["is_masked"] for p in group["params"])
            self._in_8bit = {parameter for parameter in masked if moments8bit.takes(parameter)}
        self.kernels: Kernels = "eager"

    def bind_masks(self, masks: Mapping[Tensor, Tensor]) -> None:
        """Set the mask of each masked parameter; the mask tensors are read at every step, not copied.

        Args:
            masks: bool mask (True = kept) by parameter, of the same shape. Every parameter of a group with
                `is_masked: True` needs one.

        Raises:
            ValueError: a parameter of a masked group has no mask, a mask is not bool, or shapes differ.
        """
        for parameter in (p for group in self.param_groups if group["is_masked"] for p in group["params"]):
            if parameter not in masks:
                raise ValueError(f"A masked parameter of shape {tuple(parameter.shape)} has no mask.")
        for parameter, mask in masks.items():
            if mask.shape != parameter.shape or mask.dtype != torch.bool:
                raise ValueError(
                    f"mask {mask.dtype} {tuple(mask.shape)} does not fit parameter {tuple(parameter.shape)}: "
                    "torch.bool of its shape is needed."
                )
        self._masks = dict(masks)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient.

        With lr 0 no weight changes and no masks are needed: this is how a distributed checkpoint creates the state.

        Raises:
            RuntimeError: a masked group has no masks bound and lr is not 0.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._update([(p, p, p.grad) for p in group["params"] if p.grad is not None], group)
        return loss

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As in `torch.optim.Optimizer`; step counts stay on the CPU, where an update reads them without a wait."""
        super().load_state_dict(dict(state_dict))
        for state in self.state.values():
            if "step" in state:
                state["step"] = state["step"].to("cpu")

    def begin_offload(self, model: nn.Module) -> None:
        """Called when training begins: in a run with `optimizer.offload`, the weights of the model leave the device."""

    def end_offload(self) -> None:
        """Called when training ends."""

    def true_weights(self) -> AbstractContextManager[None]:
        """Inside, every parameter holds its whole weight in its own precision; an offloaded run keeps others there."""
        return nullcontext()

    def _update(self, tensors: Sequence[tuple[Tensor, Tensor, Tensor]], group: dict[str, Any]) -> None:
        """Update parameters of one group.

        Args:
            tensors: each parameter, the weight that is updated (itself, or one elsewhere), and its gradient.
        """
        plain = []
        for parameter, weight, grad in tensors:
            state = self.state_of(parameter)
            if group["is_masked"] or parameter in self._masks:
                self._masked_step(weight, grad, self._masks.get(parameter), state, group)
            else:
                plain.append((weight, grad, state))
        if plain:
            self._plain_step(plain, group)

    def state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state of a parameter; zeros if it has not been updated yet."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = self._zero_moments(parameter)
        return state

    def _zero_moments(self, parameter: Tensor) -> tuple[Tensor, Tensor]:
        if parameter in self._in_8bit:
            return moments8bit.zero_moments(parameter)
        first, second = (torch.zeros_like(parameter, memory_format=torch.preserve_format) for _ in range(2))
        return first, second

    def _masked_step(
        self, weight: Tensor, grad: Tensor, mask: Tensor | None, state: dict[str, Tensor], group: dict[str, Any]
    ) -> None:
        state["step"] += 1
        if mask is None:
            if group["lr"] == 0:
                return
            raise RuntimeError("A masked group has no masks. Call `bind_masks({parameter: mask})` before `step()`.")
        values = StepValues(
            step=int(state["step"]), lr=float(group["lr"]), beta1=group["betas"][0], beta2=group["betas"][1],
            eps=group["eps"], weight_decay=group["weight_decay"], mask_decay=group["mask_decay"],
            is_l1=group.get("decay_norm") == "l1",
        )  # fmt: skip
        update_weights(
            group["decay_placement"], local(weight), local(grad), local(mask),
            local(state["exp_avg"]), local(state["exp_avg_sq"]), values, self.kernels,
        )  # fmt: skip

    def _plain_step(self, tensors: list[tuple[Tensor, Tensor, dict[str, Tensor]]], group: dict[str, Any]) -> None:
        states = [state for _, _, state in tensors]
        on_cpu = tensors[0][0].device.type == "cpu"
        adamw(
            [weight for weight, _, _ in tensors], [grad for _, grad, _ in tensors],
            [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states], [], [s["step"] for s in states],
            foreach=not on_cpu, fused=on_cpu,  # fused on a GPU needs `step` there, and a sync to read it
            amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"],
            weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
        )  # fmt: skip
