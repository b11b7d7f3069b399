"""Numbers of parameters by their place, and bytes with the formula they come from."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from ast_sparse.sparsity.model import decoder_blocks, sparse_layers
from ast_sparse.sparsity.slorb import SLoRB
from ast_sparse.storage.tied import is_tied

MOMENTS_8BIT = 2 + 8 / 256  # both moments of a masked weight: two bytes, and two scales for 256 of them
MASK_BYTES = 1.125  # of a masked weight: a bool, and a bit of the first mask


@dataclass(frozen=True)
class Term:
    """Bytes of one thing, and how they are counted.

    Attributes:
        how: the formula in numbers, which a reader can check.
    """

    size: int
    how: str = ""

    @classmethod
    def of(cls, count: int, each: float, pieces: int = 1, of_what: str = "") -> "Term":
        """`count` things of `each` bytes, in `pieces`."""
        named = f"{count:,}{of_what and f' {of_what}'}"
        return cls(int(count * each) // pieces, f"{named} x {each:g} bytes{f' / {pieces}' if pieces > 1 else ''}")

    def times(self, count: int) -> "Term":
        """The same `count` times."""
        return self if count == 1 else Term(count * self.size, f"{count} x ({self.how})")

    def __add__(self, other: "Term") -> "Term":
        how = " + ".join(term.how for term in (self, other) if term.size)
        return Term(self.size + other.size, how)


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters of a model; tied ones count once.

    Attributes:
        weights: all but masks.
        trained: those that the optimizer updates.
        masked: those with a mask.
        slorb: those of SLoRB.
        outside: outside the decoder blocks: embeddings, head, last norm.
        block: of the largest decoder block.
        last: what FSDP2 gathers for the loss: the head, the last norm, and embeddings that share the head's weight.
        first: embeddings that are gathered by themselves; 0 if the head has their weight.
        tensor: of the largest tensor.
        largest: of the largest trained tensor that has a mask.
        plain: trained ones without a mask.
    """

    weights: int
    trained: int
    masked: int
    slorb: int
    outside: int
    block: int
    last: int
    first: int
    tensor: int
    largest: int
    plain: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Sizes":
        """The numbers of a model, sparse or dense."""
        blocks = decoder_blocks(model).values()
        inside = nn.ModuleList(blocks)  # one module, so that shared weights are counted once
        masked = {layer.weight for layer in sparse_layers(model).values()}
        trained = [p for p in model.parameters() if p.requires_grad]
        plain = [p.numel() for p in trained if p not in masked]
        weights = _count(model.parameters())
        outside = weights - _count(inside.parameters())
        first = 0 if is_tied(model) else _count(model.get_input_embeddings().parameters())
        return cls(
            weights=weights,
            trained=_count(trained),
            masked=_count(masked),
            slorb=sum(_count(module.parameters()) for module in model.modules() if isinstance(module, SLoRB)),
            outside=outside,
            block=max(_count(block.parameters()) for block in blocks),
            last=outside - first,
            first=first,
            tensor=max(p.numel() for p in model.parameters()),
            largest=max((weight.numel() for weight in masked), default=0),
            plain=sum(plain),
        )


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters if p.is_floating_point())
