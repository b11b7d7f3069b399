import copy
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ast_sparse.kernels.updates import PLACEMENTS
from ast_sparse.optim import SparseAdamW

LR, BETAS, EPS, DECAY = 1e-2, (0.9, 0.95), 1e-8, 0.1


def slow_step(state: dict, w: float, g: float, kept: bool, t: int, lam: float, placement: str, wd: float) -> float:
    """One update of one element, straight from (16)-(23), in Python floats."""
    b1, b2 = BETAS
    pruned = 0.0 if kept else w
    if placement == "gradient":
        g = g + lam * pruned  # (18)
    state["u"] = b1 * state["u"] + (1 - b1) * g  # (20)
    step = state["u"]
    if placement == "momentum":
        step = state["u"] + lam * pruned  # (21)
        state["v"] = b2 * state["v"] + (1 - b2) * step**2  # (22)
    else:
        state["v"] = b2 * state["v"] + (1 - b2) * g**2
    v_hat = state["v"] / (1 - b2**t)
    new = w - LR * step / ((1 - b1**t) * (math.sqrt(v_hat) + EPS)) - LR * wd * w  # (23)
    if placement == "weight":
        new -= LR * lam * pruned  # (16)-(17)
    return new


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("group", [{"is_masked": True}, {}])
def test_masked_update_follows_the_equations(placement: str, weight_decay: float, group: dict) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    mask = torch.rand(3, 8, generator=generator) < 0.5
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = SparseAdamW([{"params": [parameter], **group}], LR, BETAS, EPS, weight_decay, decay_placement=placement)
    optimizer.bind_masks({parameter: mask})
    slow = [float(w) for w in weight.flatten()]
    states = [{"u": 0.0, "v": 0.0} for _ in slow]
    for t in range(1, 9):
        lam = 0.0 if t == 1 else 0.05 * t
        if t == 5:
            mask.copy_(torch.rand(3, 8, generator=generator) < 0.5)  # a refresh: the bound tensor is read in each step
        grad = torch.randn(3, 8, generator=generator, dtype=torch.float64)
        optimizer.param_groups[0]["mask_decay"] = lam
        parameter.grad = grad.clone()
        optimizer.step()
        for i, (g, kept) in enumerate(zip(grad.flatten(), mask.flatten(), strict=True)):
            slow[i] = slow_step(states[i], slow[i], float(g), bool(kept), t, lam, placement, weight_decay)
        torch.testing.assert_close(parameter.flatten(), torch.tensor(slow, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("placement", "pruned"), [("momentum", -0.15), ("gradient", -0.26), ("weight", -0.2597)])
def test_a_decay_by_the_sign_is_hand_computed(placement: str, pruned: float) -> None:
    """First step, g = 0.1, λ = 0.03, γ = 0.01: v̂ is the square of what enters v, and u is 0.01.

    momentum: ũ = 0.01 - 0.03, W = -0.25 + γ·0.02/(0.1·0.02). gradient: g̃ = 0.1 - 0.03, W = -0.25 - γ. weight: W =
    -0.25 - γ + γ·0.03. Kept: momentum 0.5 - γ·0.01/(0.1·0.01), the others 0.5 - γ.
    """
    parameter = torch.nn.Parameter(torch.tensor([0.5, -0.25], dtype=torch.float64))
    group = {"params": [parameter], "is_masked": True}
    optimizer = SparseAdamW([group], 0.01, BETAS, 0.0, 0.0, 0.03, placement, decay_norm="l1")
    optimizer.bind_masks({parameter: torch.tensor([True, False])})
    parameter.grad = torch.tensor([0.1, 0.1], dtype=torch.float64)
    optimizer.step()
    kept = 0.4 if placement == "momentum" else 0.49
    torch.testing.assert_close(parameter.data, torch.tensor([kept, pruned], dtype=torch.float64), rtol=1e-12, atol=0)


def test_a_state_from_before_the_decay_norm_is_loaded() -> None:
    parameter = torch.nn.Parameter(torch.ones(4))
    plain, signed = SparseAdamW([parameter]), SparseAdamW([parameter], decay_norm="l1")
    assert "decay_norm" not in plain.param_groups[0]  # so states of earlier versions have the same entries
    signed.load_state_dict(signed.state_dict())
    assert signed.param_groups[0]["decay_norm"] == "l1"
    with pytest.raises(ValueError, match="decay_norm='l3' is unknown"):
        SparseAdamW([parameter], decay_norm="l3")  # type: ignore[arg-type]


def test_unmasked_parameters_get_torch_adamw() -> None:
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(5, 7)), torch.nn.Parameter(torch.randn(7))]
    theirs = copy.deepcopy(ours)
    a = SparseAdamW(ours, LR, BETAS, EPS, DECAY)
    b = torch.optim.AdamW(theirs, LR, BETAS, EPS, DECAY)
    for _ in range(6):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def masked_pair(placement: str) -> tuple[torch.nn.Parameter, SparseAdamW]:
    parameter = torch.nn.Parameter(torch.tensor([[5.0, -7.0, 3.0, -4.0]], dtype=torch.float64))
    optimizer = SparseAdamW(
        [{"params": [parameter], "is_masked": True}], 1e-3, mask_decay=0.1, decay_placement=placement
    )
    optimizer.bind_masks({parameter: torch.tensor([[True, True, False, False]])})
    return parameter, optimizer


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_pruned_weight_with_zero_gradient_shrinks_and_kept_one_stays(placement: str) -> None:
    parameter, optimizer = masked_pair(placement)
    for _ in range(20):
        before = parameter.detach().clone()
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        assert torch.equal(parameter[0, :2], before[0, :2])
        assert (parameter[0, 2:].abs() < before[0, 2:].abs()).all()
        assert torch.equal(parameter[0, 2:].sign(), before[0, 2:].sign())


def test_momentum_placement_never_writes_the_decay_into_the_first_moment() -> None:
    parameter, optimizer = masked_pair("momentum")
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert not optimizer.state[parameter]["exp_avg"].any()
    assert optimizer.state[parameter]["exp_avg_sq"][0, 2:].all()


def test_lr_zero_without_masks_is_a_no_op_that_creates_the_state() -> None:
    parameter = torch.nn.Parameter(torch.randn(2, 4))
    before = parameter.detach().clone()
    optimizer = SparseAdamW([{"params": [parameter], "is_masked": True}], lr=0.0)
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(parameter, before)
    assert set(optimizer.state[parameter]) == {"step", "exp_avg", "exp_avg_sq"}


def test_stepping_without_masks_is_refused() -> None:
    parameter = torch.nn.Parameter(torch.randn(2, 4))
    optimizer = SparseAdamW([{"params": [parameter], "is_masked": True}], lr=1e-3)
    parameter.grad = torch.zeros_like(parameter)
    with pytest.raises(RuntimeError, match="bind_masks"):
        optimizer.step()


def test_masks_that_do_not_fit_are_refused() -> None:
    parameter = torch.nn.Parameter(torch.randn(2, 4))
    optimizer = SparseAdamW([{"params": [parameter], "is_masked": True}])
    with pytest.raises(ValueError, match="has no mask"):
        optimizer.bind_masks({})
    with pytest.raises(ValueError, match="does not fit"):
        optimizer.bind_masks({parameter: torch.ones(4, 2, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"torch\.bool of its shape"):
        optimizer.bind_masks({parameter: torch.ones(2, 4, dtype=torch.int32)})  # ~1 is -2: the decay would grow weights


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_saved_state_continues_bit_for_bit(placement: str) -> None:
    def run(optimizer: SparseAdamW, parameter: torch.nn.Parameter, steps: range) -> None:
        for t in steps:
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(t))
            optimizer.step()

    start = torch.randn(2, 8, generator=torch.Generator().manual_seed(9))
    mask = torch.tensor([True, False] * 8).reshape(2, 8)

    def fresh(value: torch.Tensor) -> tuple[SparseAdamW, torch.nn.Parameter]:
        parameter = torch.nn.Parameter(value.clone())
        optimizer = SparseAdamW([{"params": [parameter], "is_masked": True}], mask_decay=0.1, decay_placement=placement)
        optimizer.bind_masks({parameter: mask})
        return optimizer, parameter

    whole, through = fresh(start)
    run(whole, through, range(6))
    first, p = fresh(start)
    run(first, p, range(3))
    second, q = fresh(p.detach())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(second, q, range(3, 6))
    assert torch.equal(through, q)
    assert all(torch.equal(whole.state[through][key], second.state[q][key]) for key in ("exp_avg", "exp_avg_sq"))


def test_step_counts_that_were_read_onto_a_gpu_go_back_to_the_cpu() -> None:
    """As Trainer reads a checkpoint on several processes; a step count on a GPU would be waited for at every update."""
    with FakeTensorMode():
        parameter = torch.nn.Parameter(torch.empty(2, 8, device="cuda"))
        optimizer = SparseAdamW([{"params": [parameter], "is_masked": True}])
        optimizer.state_of(parameter)
        read = optimizer.state_dict()
        read["state"][0] = {key: torch.empty(value.shape, device="cuda") for key, value in read["state"][0].items()}
        optimizer.load_state_dict(read)
        devices = {key: value.device.type for key, value in optimizer.state[parameter].items()}
    assert devices == {"step": "cpu", "exp_avg": "cuda", "exp_avg_sq": "cuda"}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(decay_placement="moment"), "decay_placement='moment' is unknown"),
        (dict(lr=-1.0), "lr=-1.0"),
        (dict(mask_decay=float("nan")), "mask_decay=nan"),
        (dict(betas=(0.9, 1.0)), "betas"),
    ],
)
def test_values_out_of_range_are_refused(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseAdamW([torch.nn.Parameter(torch.randn(2))], **kwargs)
