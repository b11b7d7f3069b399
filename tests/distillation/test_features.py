import pytest
import torch

from ast_sparse.config import DistillationConfig
from ast_sparse.distillation.features import (
    Features,
    attention_kl,
    attention_mse,
    counted_positions,
    feature_loss,
    hidden_loss,
    needs_attention,
    needs_hidden,
    recorded_blocks,
    relative_hidden_loss,
)
from tests.models import VOCAB, tiny_model

BATCH, SEQ, HIDDEN, HEADS, BLOCKS = 2, 5, 6, 3, 2
HIDDEN_LOSSES = (hidden_loss, relative_hidden_loss)
ATTENTION_LOSSES = (attention_mse, attention_kl)
LOSSES = HIDDEN_LOSSES + ATTENTION_LOSSES
CONFIGS = [
    DistillationConfig(kind=kind, hidden_weight=hidden, attention_weight=attention)
    for kind in ("tinybert", "mobilebert", "squarehead")
    for hidden, attention in ((1.0, 1.0), (0.3, 7.0), (0.0, 2.0), (2.0, 0.0))
]


def random_features(loss, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states or causal attention maps of student and teacher."""
    generator = torch.Generator().manual_seed(seed)
    if loss in HIDDEN_LOSSES:
        pair = torch.randn(2, BATCH, SEQ, HIDDEN, generator=generator, dtype=torch.float64)
    else:
        scores = 2 * torch.randn(2, BATCH, HEADS, SEQ, SEQ, generator=generator, dtype=torch.float64)
        pair = scores.masked_fill(torch.ones(SEQ, SEQ).triu(1).bool(), -torch.inf).softmax(-1)
    student, teacher = pair.to(dtype)
    return student.clone().requires_grad_(), teacher.clone()


def random_labels(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, VOCAB, (BATCH, SEQ), generator=generator)
    labels[0, 1] = labels[1, -1] = labels[0, -1] = -100
    return labels


def plain_loss(loss, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Number by number, from the equations, differentiable by autograd."""
    total, error, size, count = student.new_zeros(()), student.new_zeros(()), student.new_zeros(()), 0
    for row in range(BATCH):
        for place in range(SEQ):
            if labels[row, place] == -100:
                continue
            count += 1
            if loss in HIDDEN_LOSSES:
                for i in range(HIDDEN):
                    difference = student[row, place, i] - teacher[row, place, i]
                    error, size = error + difference**2, size + teacher[row, place, i] ** 2
                    total = total + difference**2 / HIDDEN
                continue
            for head in range(HEADS):
                ours, theirs = student[row, head, place], teacher[row, head, place]
                if loss is attention_mse:
                    total = total + sum((ours[key] - theirs[key]) ** 2 for key in range(SEQ)) / (HEADS * SEQ)
                else:  # keys after the query are hidden
                    logs = (theirs[key] * (theirs[key] / ours[key]).log() for key in range(place + 1))
                    total = total + sum(logs) / HEADS
    return count * error / size if loss is relative_hidden_loss else total


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_gradient_equal_the_plain_formula_in_float64(loss, seed: int) -> None:
    student, teacher = random_features(loss, seed)
    labels = random_labels(seed)
    value = loss(student, teacher, counted_positions(labels))
    (ours,) = torch.autograd.grad(3 * value, student)
    expected = plain_loss(loss, student, teacher, labels)
    (theirs,) = torch.autograd.grad(3 * expected, student)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_kinds_weigh_their_losses_and_add_them_over_the_blocks(config: DistillationConfig) -> None:
    hidden = relative_hidden_loss if config.kind == "squarehead" else hidden_loss
    attention = attention_kl if config.kind == "mobilebert" else attention_mse
    hiddens = [random_features(hidden, seed) for seed in range(BLOCKS)]
    maps = [random_features(attention, seed) for seed in range(BLOCKS)]
    labels = random_labels()
    sides = []
    for side in (0, 1):
        sides.append(
            Features(
                tuple(pair[side] for pair in hiddens) if needs_hidden(config) else (),
                tuple(pair[side] for pair in maps) if needs_attention(config) else (),
            )
        )
    expected = sum(config.hidden_weight * plain_loss(hidden, *pair, labels) for pair in hiddens)
    if config.kind != "squarehead":
        expected = expected + sum(config.attention_weight * plain_loss(attention, *pair, labels) for pair in maps)
    assert feature_loss(*sides, labels, config).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_equal_features_have_no_loss(loss) -> None:
    student, _ = random_features(loss)
    value = loss(student, student.detach(), counted_positions(random_labels()))
    assert abs(value.item()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", LOSSES)
def test_low_precision_features_are_summed_in_float32(loss, dtype: torch.dtype) -> None:
    student, teacher = random_features(loss, dtype=dtype)
    labels = random_labels()
    value = loss(student, teacher, counted_positions(labels))
    assert value.dtype == torch.float32
    expected = plain_loss(loss, student.double(), teacher.double(), labels)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_teacher_of_lower_precision_is_compared_in_float32(loss) -> None:
    student, teacher = random_features(loss, dtype=torch.float32)
    value = loss(student, teacher.bfloat16(), counted_positions(random_labels()))
    assert value.dtype == torch.float32


@pytest.mark.parametrize("loss", LOSSES)
def test_ignored_positions_have_no_gradient_and_may_hold_anything(loss) -> None:
    student, teacher = random_features(loss)
    labels = random_labels()
    clean = loss(student, teacher, counted_positions(labels))
    with torch.no_grad():
        places = student if loss in HIDDEN_LOSSES else student.transpose(1, 2)
        places[labels == -100] = torch.nan
    value = loss(student, teacher, counted_positions(labels))
    (grad,) = torch.autograd.grad(value, student)
    places = grad if loss in HIDDEN_LOSSES else grad.transpose(1, 2)
    torch.testing.assert_close(value, clean)
    assert torch.isfinite(grad).all() and not places[labels == -100].any()


@pytest.mark.parametrize("loss", LOSSES)
def test_a_batch_without_counted_positions_adds_nothing(loss) -> None:
    student, teacher = random_features(loss)
    value = loss(student, teacher, counted_positions(torch.full((BATCH, SEQ), -100)))
    (grad,) = torch.autograd.grad(value, student)
    assert value == 0 and not grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_probability_that_underflows_gives_a_finite_kl(dtype: torch.dtype) -> None:
    student, teacher = random_features(attention_kl, dtype=dtype)
    with torch.no_grad():
        student[..., -1, :] = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0])
        student[..., -2, :] = torch.tensor([1.0, 1e-40, 0.0, 0.0, 0.0])
    value = attention_kl(student, teacher, counted_positions(torch.zeros(BATCH, SEQ)))
    (grad,) = torch.autograd.grad(value, student)
    assert torch.isfinite(value) and value > 10 and torch.isfinite(grad).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_the_teacher_gets_no_gradient(loss) -> None:
    student, teacher = random_features(loss)
    loss(student, teacher.requires_grad_(), counted_positions(random_labels())).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("loss", LOSSES)
def test_shapes_that_differ_are_refused(loss) -> None:
    student, teacher = random_features(loss)
    with pytest.raises(ValueError, match="teacher features"):
        loss(student, teacher[:, :1], counted_positions(random_labels()))


def test_another_number_of_blocks_is_refused() -> None:
    student, teacher = random_features(hidden_loss)
    with pytest.raises(ValueError, match="zip"):
        feature_loss(Features((student,)), Features((teacher,) * 2), random_labels(), DistillationConfig())


@pytest.mark.parametrize(
    ("config", "hidden", "attention"),
    [
        (None, False, False),
        (DistillationConfig(), False, False),
        (DistillationConfig(kind="reverse_kl"), False, False),
        (DistillationConfig(kind="tinybert"), True, True),
        (DistillationConfig(kind="mobilebert"), True, True),
        (DistillationConfig(kind="squarehead"), True, False),
        (DistillationConfig(kind="tinybert", attention_weight=0), True, False),
        (DistillationConfig(kind="mobilebert", hidden_weight=0), False, True),
        (DistillationConfig(kind="squarehead", hidden_weight=0), False, False),
        (DistillationConfig(kind="tinybert", alpha=0), False, False),
    ],
)
def test_only_what_the_loss_looks_at_is_needed(config: DistillationConfig | None, hidden: bool, attention: bool):
    assert (needs_hidden(config), needs_attention(config)) == (hidden, attention)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_recorded_blocks_are_hidden_states_before_the_final_norm(family: str) -> None:
    model = tiny_model(family)
    ids = torch.randint(0, VOCAB, (2, 7))
    with recorded_blocks(model) as outputs:
        states = model(ids, output_hidden_states=True).hidden_states
    assert len(outputs) == 2
    torch.testing.assert_close(outputs[0], states[1], rtol=0, atol=0)
    norm = {"llama": "model.norm", "gpt2": "transformer.ln_f", "opt": "model.decoder.final_layer_norm"}[family]
    torch.testing.assert_close(model.get_submodule(norm)(outputs[1]), states[2], rtol=0, atol=0)
    assert not torch.equal(outputs[1], states[2])


def test_nothing_is_recorded_outside_the_context_even_after_an_error() -> None:
    model = tiny_model("llama")
    before = sum(len(module._forward_hooks) for module in model.modules())
    with pytest.raises(RuntimeError, match="inside"), recorded_blocks(model) as outputs:
        raise RuntimeError("inside")
    model(torch.randint(0, VOCAB, (2, 7)))
    assert outputs == []
    assert sum(len(module._forward_hooks) for module in model.modules()) == before


def test_a_block_that_returns_a_tuple_is_recorded_by_its_first_entry() -> None:
    class Block(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
            return x + 1, None

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList([Block(), Block()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)[0]
            return x

    model = Model()
    with recorded_blocks(model) as outputs:
        model(torch.zeros(1, 2, 3))
    assert [output.unique().tolist() for output in outputs] == [[1.0], [2.0]]
