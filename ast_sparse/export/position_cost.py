"""What the positions of n:2n masks cost, by pattern and by code, counted on a model's masks (paper Sec. 6.1)."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ast_sparse.errors import UserError
from ast_sparse.export.position_codes import (
    LARGEST_HALF,
    HuffmanCode,
    closed_bound,
    decode_fixed,
    encode_fixed,
    fixed_bits,
    pattern_rank,
    pattern_unrank,
    uniform_huffman_bits,
)
from ast_sparse.progress import progress_bar
from ast_sparse.sparsity.masks import Pattern, check_nm, nm_mask
from ast_sparse.tables import format_table

HALVES = (1, 2, 4, 8, 16)  # n of the paper's patterns n:2n

_DENSE_BITS = 32
_CHECKED = 2**18  # groups of a pattern that are encoded and decoded
_GROUPS_PER_PATTERN = 100  # fewer cannot show frequencies: even with these the entropy is too low by 1/140 bit
_RANKED = 2**16  # groups whose temporaries fit in the cache

_COLUMNS = {
    "bitmask": "bitmask", "index": "index", "combinatorial": "combinatorial", "huffman": "Huffman",
    "entropy": "entropy", "bound": "log2 C(2n,n)", "closed_bound": "2n-log2√(πn)",
}  # fmt: skip
_LEGEND = (
    "Huffman (without its table) and entropy are measured over all groups, the other columns are formulas. The paper",
    "uses the combinatorial code. The last two columns: the bound for equally frequent patterns, and its closed form.",
)


def weight_bits(position_bits: float, n: int, value_bits: int = 4) -> float:
    """Bits per weight of a group of n:2n, values and positions; divided by 32, the paper's `C_n` (Sec. 6.1)."""
    return (value_bits * n + position_bits) / (2 * n)


@dataclass(frozen=True)
class Layer:
    """A linear layer: `weight` `[out, in]`, and its bool `mask` if the checkpoint has one (default: the non-zeros)."""

    weight: Tensor
    mask: Tensor | None = None

    @property
    def kept(self) -> Tensor:
        """Bool `[out, in]`."""
        return self.weight != 0 if self.mask is None else self.mask


@dataclass(frozen=True)
class PatternCost:
    """What the positions of one pattern cost.

    Attributes:
        n: of the pattern n:2n.
        own: whether the masks are the model's own; if not, magnitude chooses, and ties keep the lower column.
        layers, groups: how many the pattern was measured on.
        checked: groups that were encoded by every code (Huffman: if `used` is known), decoded and found equal.
        tied: groups whose smallest kept and largest pruned weight are equal; None for the model's own mask.
        used: how many different patterns occur; None if there are too few groups to show frequencies.
        bits: mean bits per group by code. Huffman: over all groups, without its table; without frequencies, the closed
            form for equal ones.
        entropy: of the frequencies, in bits per group.
    """

    n: int
    own: bool
    layers: int
    groups: int
    checked: int
    tied: int | None
    used: int | None
    bits: dict[str, float]
    entropy: float | None

    @property
    def pattern(self) -> str:
        """As text, such as 2:4."""
        return f"{self.n}:{2 * self.n}"

    @property
    def patterns(self) -> int:
        """How many different patterns are possible."""
        return math.comb(2 * self.n, self.n)

    @property
    def position_bits(self) -> dict[str, float | None]:
        """Bits per group of every code, the entropy, the bound for equal frequencies and the paper's closed form."""
        bounds = {"bound": math.log2(self.patterns), "closed_bound": closed_bound(self.n)}
        return {**self.bits, "entropy": self.entropy, **bounds}


@dataclass(frozen=True)
class CompressionTable:
    """What the positions of a model's masks cost.

    Attributes:
        rows: one per pattern, narrowest first.
        layers, weights: how many were counted.
        own: the model's own pattern n:2n; None for a dense model.
        value_bits: bits of a kept value.
        left_out: which layers are not counted, and why.
    """

    rows: tuple[PatternCost, ...]
    layers: int
    weights: int
    own: str | None
    value_bits: int
    left_out: tuple[str, ...]

    @property
    def limit(self) -> float:
        """The limit of C_n: one bit per weight for the positions (paper Sec. 6.1: 3/32 with values of 4 bits)."""
        return (self.value_bits / 2 + 1) / _DENSE_BITS

    def results(self, row: PatternCost) -> dict[str, dict[str, float | None]]:
        """The results of a row by unit and code."""

        def each(convert: Callable[[float], float]) -> dict[str, float | None]:
            return {code: None if bits is None else convert(bits) for code, bits in row.position_bits.items()}

        return {
            "position_bits_per_group": row.position_bits,
            "position_bits_per_weight": each(lambda bits: bits / (2 * row.n)),
            "bits_per_weight": each(lambda bits: weight_bits(bits, row.n, self.value_bits)),
            "share_of_float32": each(lambda bits: weight_bits(bits, row.n, self.value_bits) / _DENSE_BITS),
        }

    def to_dict(self) -> dict[str, Any]:
        """All results, for JSON."""
        keys = ("pattern", "own", "layers", "groups", "checked", "tied", "patterns", "used")
        rows = [{**{key: getattr(row, key) for key in keys}, **self.results(row)} for row in self.rows]
        totals = {key: getattr(self, key) for key in ("own", "layers", "weights", "value_bits", "limit", "left_out")}
        return {**totals, "rows": rows}

    def lines(self) -> list[str]:
        """The tables as text: the masks, then bits per group, per weight, with the values, relative to float32."""
        values = f"values counted at {self.value_bits} bits"
        sections = {
            "position_bits_per_group": ("Bits of positions per group of 2n weights", ".3f"),
            "position_bits_per_weight": ("Bits of positions per weight: the same / 2n", ".4f"),
            "bits_per_weight": (f"Bits per weight, {values}: {self.value_bits}/2 + positions", ".4f"),
            "share_of_float32": (
                f"C_n, relative to dense float32, {values}: ({self.value_bits}n + positions) / 64n; "
                f"the limit is {self.limit:.3%}",
                ".3%",
            ),
        }
        lines = [*self._masks(), "", *_LEGEND]
        for key, (title, form) in sections.items():
            rows = [(row.pattern, *_shown(self.results(row)[key], form)) for row in self.rows]
            lines += ["", f"{title}:", format_table(("pattern", *_COLUMNS.values()), rows)]
        return lines

    def _masks(self) -> list[str]:
        headers = ("pattern", "masks", "layers", "groups", "tied", "patterns", "used", "frequencies", "round trips")
        rows = []
        for row in self.rows:
            tied = None if row.tied is None else f"{row.tied / row.groups:.2%}"
            kind = "uniform" if row.used is None else "measured"
            masks = "own" if row.own else "magnitude"
            rows.append((row.pattern, masks, row.layers, row.groups, tied, row.patterns, row.used, kind, row.checked))
        where = f"of {self.weights:,} weights in {self.layers} layers of the decoder blocks"
        if self.own is None:
            lines = [f"The model is dense: masks that magnitude would choose, {where}"]
        else:
            lines = [f"The model is {self.own}: its own masks where they fit the pattern, {where}"]
        lines.append(format_table(headers, rows))
        wider = [row.pattern for row in self.rows if row.own and row.pattern != self.own]
        if self.own is not None:
            also = f", which is {', '.join(wider)} too" if wider else ""
            lines.append(f"own: the model's own {self.own} mask{also}.")
        if not all(row.own for row in self.rows):
            lines.append("magnitude: what magnitude keeps of the stored weights; ties keep the lower column.")
        if any(row.tied for row in self.rows):
            lines.append("tied: groups whose smallest kept and largest pruned weight are equal.")
        lines.append("round trips: groups encoded by every code (Huffman: where measured), decoded and found equal.")
        lines += [self._uniform(row) for row in self.rows if row.used is None]
        return lines + [f"left out: {reason}" for reason in self.left_out]

    def _uniform(self, row: PatternCost) -> str:
        fewer = f", though a {self.own} mask uses fewer of them" if row.own and row.pattern != self.own else ""
        return (
            f"{row.pattern}: {row.groups:,} groups are too few to show the frequencies of {row.patterns:,} patterns; "
            f"Huffman is the closed form for equal ones{fewer}."
        )


def _shown(results: Mapping[str, float | None], form: str) -> list[str | None]:
    return [None if results[column] is None else format(results[column], form) for column in _COLUMNS]


@torch.no_grad()
def measure_positions(
    layers: Mapping[str, Layer],
    pattern: Pattern | None = None,
    *,
    pruned: Collection[str] = (),
    value_bits: int = 4,
    progress: bool = False,
) -> CompressionTable:
    """Count what the positions cost in 1:2, 2:4, 4:8, 8:16, 16:32 and the model's own pattern.

    The model's own masks are measured in every pattern they fit; for the others, magnitude chooses.

    Args:
        layers: on the CPU, by name.
        pattern: the model's own; None: the narrowest one that its zeros fit; if there is none, the model is dense.
        pruned: names of layers that must fit the model's own pattern; others that do not are left out.
        value_bits: bits of a kept value.
        progress: show a bar over the layers.

    Raises:
        UserError: there is no layer, weights are not finite, the pattern is not n:2n or the layers do not fit it, or
            no layer has whole groups.
    """
    if not layers:
        raise UserError("The model has no linear layer in its decoder blocks, so there is no mask to count.")
    own = _own_half(layers.values()) if pattern is None else half_of(pattern)
    chosen, reasons = _choose(layers, own, pruned)
    tallies, shapes = _tallies(chosen, own)
    for name, layer in progress_bar(chosen.items(), "Counting", disable=not progress, unit="layer"):
        if not bool(layer.weight.isfinite().all()):
            raise UserError(f"`{name}` holds values that are not finite. Choose an earlier checkpoint.")
        own_mask = None if own is None else _own_mask(layer, own)
        for tally in tallies:
            tally.add(layer.weight, own_mask)
    rows = tuple(tally.cost() for tally in progress_bar(tallies, "Encoding", disable=not progress, unit="pattern"))
    weights = sum(layer.weight.numel() for layer in chosen.values())
    name = None if own is None else f"{own}:{2 * own}"
    return CompressionTable(rows, len(chosen), weights, name, value_bits, (*reasons, *shapes))


def half_of(pattern: Pattern) -> int:
    """n of a pattern n:2n; UserError for any other."""
    if not pattern.structured or pattern.m != 2 * pattern.n or pattern.n > LARGEST_HALF:
        raise UserError(
            f"The table has patterns n:2n up to {LARGEST_HALF}:{2 * LARGEST_HALF}, but the model's is {pattern}. "
            "Choose another model, or name its pattern with --pattern."
        )
    return pattern.n


def _own_half(layers: Iterable[Layer]) -> int | None:
    """n of the narrowest of the paper's patterns that the pruned layers fit; None if no layer is pruned."""
    masks = (layer.kept for layer in layers)
    pruned = (mask for mask in masks if 0 < int(mask.count_nonzero()) <= mask.numel() // 2)
    return max((next((n for n in HALVES if check_nm(mask, n, 2 * n)), 0) for mask in pruned), default=0) or None


def _own_mask(layer: Layer, n: int) -> Tensor:
    """What is kept, and the last zeros of groups that keep fewer than n, as in the compressed format."""
    return nm_mask(layer.kept.flip(-1).byte(), n, 2 * n).flip(-1)


def _choose(
    layers: Mapping[str, Layer], own: int | None, pruned: Collection[str]
) -> tuple[dict[str, Layer], list[str]]:
    """The layers that fit the model's own pattern (all of a dense model), and in words what is left out."""
    if own is None and pruned:
        raise UserError(
            f"`{min(pruned)}` is pruned, but not to any of {', '.join(f'{n}:{2 * n}' for n in HALVES)}. Name the "
            "model's pattern with --pattern."
        )
    if own is None:
        return dict(layers), []
    chosen = {name: layer for name, layer in layers.items() if check_nm(layer.kept, own, 2 * own)}
    others = [name for name in layers if name not in chosen]
    shown = [name for name in chosen if name in pruned or bool(layers[name].kept.any())]  # zero layers prove nothing
    if faulty := [name for name in others if name in pruned or not shown]:
        raise UserError(
            f"`{faulty[0]}` of shape {tuple(layers[faulty[0]].weight.shape)} is not {own}:{2 * own}. Name the model's "
            "pattern with --pattern, or prune it first with ast-prune or ast-train."
        )
    return chosen, [f"{len(others)} layers, e.g. {others[0]}: not {own}:{2 * own}"] if others else []


def _tallies(layers: Mapping[str, Layer], own: int | None) -> tuple[list["_Tally"], list[str]]:
    """One tally for each pattern for which some layer has whole groups, and in words which layers have none."""
    widths = {name: layer.weight.shape[1] for name, layer in layers.items()}
    tallies, reasons = [], []
    for n in sorted({*HALVES, own or HALVES[0]}):
        m = 2 * n
        weights = [layer.weight.numel() for layer in layers.values() if layer.weight.shape[1] % m == 0]
        if weights:
            tallies.append(_Tally(n, own is not None and n % own == 0, len(weights), sum(weights) // m))
        if unfit := [name for name, width in widths.items() if width % m]:
            width = widths[unfit[0]]
            reasons.append(
                f"{len(unfit)} layers of {n}:{m}, e.g. {unfit[0]}: in_features={width} is not a multiple of {m}"
            )
    if not tallies:
        raise UserError(f"No layer has whole groups: {reasons[0]}. Choose another model.")
    return tallies, reasons


@dataclass
class _Tally:
    """What is collected for one pattern over the layers."""

    n: int
    own: bool
    layers: int
    groups: int
    tied: int = 0
    sample: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        patterns = math.comb(2 * self.n, self.n)
        enough = self.groups >= _GROUPS_PER_PATTERN * patterns
        self.counts = torch.zeros(patterns, dtype=torch.int64) if enough else None
        self._step = -(-self.groups // _CHECKED)

    def add(self, weight: Tensor, own_mask: Tensor | None) -> None:
        n, m = self.n, 2 * self.n
        if weight.shape[1] % m:
            return
        sizes = weight.abs()
        mask = own_mask if self.own and own_mask is not None else nm_mask(sizes, n, m)
        groups = mask.reshape(-1, m)
        self.sample.append(groups[:: self._step].clone())
        if self.counts is not None:
            for block in groups.split(_RANKED):
                self.counts += torch.bincount(pattern_rank(block, n), minlength=self.counts.numel())
        if not self.own:
            kept = torch.where(mask, sizes, torch.inf).view(-1, m).amin(-1)
            pruned = torch.where(mask, -1, sizes).view(-1, m).amax(-1)
            self.tied += int((kept == pruned).sum())

    def cost(self) -> PatternCost:
        groups = torch.cat(self.sample)
        bits: dict[str, float] = {**_check_fixed(groups, self.n), "huffman": uniform_huffman_bits(self.n)}
        used = entropy = None
        if self.counts is not None:
            counts = self.counts.numpy()
            bits["huffman"] = _check_huffman(groups, self.n, counts)
            shares = counts[counts > 0] / counts.sum()
            used, entropy = shares.size, max(0.0, -float((shares * np.log2(shares)).sum()))
        tied = None if self.own else self.tied
        return PatternCost(self.n, self.own, self.layers, self.groups, len(groups), tied, used, bits, entropy)


def _check_fixed(groups: Tensor, n: int) -> dict[str, int]:
    """Encode and decode groups `[count, 2n]` with each fixed-length code; return its bits per group."""
    count, m = groups.shape
    bits = fixed_bits(n)
    values = {
        "bitmask": groups.flatten().byte(),
        "index": groups.nonzero()[:, 1],
        "combinatorial": pattern_rank(groups, n),
    }
    decoded = {}
    for code, numbers in values.items():
        width = bits[code] * count // numbers.numel()
        stream = encode_fixed(numbers.numpy(), width)
        decoded[code] = torch.from_numpy(decode_fixed(stream, width, numbers.numel()))
    _require_equal(decoded["bitmask"].view(count, m).bool(), groups, "bitmask")
    columns = decoded["index"].view(count, n)
    _require_equal(torch.zeros_like(groups).scatter_(1, columns, True), groups, "index")
    _require_equal(pattern_unrank(decoded["combinatorial"], n, m), groups, "combinatorial")
    return bits


def _check_huffman(groups: Tensor, n: int, counts: npt.NDArray[np.int64]) -> float:
    """Encode and decode groups `[count, 2n]`; return the mean bits over all groups that were counted."""
    code = HuffmanCode(counts)
    decoded = code.decode(*code.encode(pattern_rank(groups, n).numpy()), len(groups))
    _require_equal(pattern_unrank(torch.from_numpy(decoded), n, 2 * n), groups, "Huffman")
    return float((counts * code.lengths).sum() / counts.sum())


def _require_equal(decoded: Tensor, groups: Tensor, code: str) -> None:
    if not torch.equal(decoded, groups):
        raise RuntimeError(f"The {code} code of groups of {groups.shape[1]} does not return the masks.")
