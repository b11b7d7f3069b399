"""What an export holds and how large it is."""

from dataclasses import dataclass
from pathlib import Path

from ast_sparse.export.adapter_merge import MergeReport


@dataclass(frozen=True)
class SizeRow:
    """One line of the table.

    Attributes:
        section: what is counted.
        layers: number of layers or tensors.
        parameters: number of their entries.
        dense_bytes: their size if stored dense in the dtype of the export.
        stored_bytes: their size in the export.
    """

    section: str
    layers: int
    parameters: int
    dense_bytes: int
    stored_bytes: int

    @property
    def ratio(self) -> float:
        """Stored size divided by dense size."""
        return self.stored_bytes / self.dense_bytes if self.dense_bytes else 1.0


@dataclass(frozen=True)
class ExportReport:
    """The outcome of an export that was read back and verified.

    Attributes:
        out_dir: folder of the export.
        format: as in `export_model`.
        dtype: name of the dtype of the weights.
        pattern: N:M that every pruned layer was checked against.
        pruned: the row of the pruned layers.
        others: the rows of the linear layers that were left dense, of SLoRB, and of everything else.
        dense_layers: reason, by name, for the linear layers that were left dense.
        nonzero_share: share of the entries of the pruned layers that are not zero.
        files: size by name of every file written.
        merge: what merging an adapter cost, None if none was merged.
        notes: more lines: the bits of a weight, and what was rounded.
        uploaded: address of the repository on the hub, None if it was not uploaded.
    """

    out_dir: Path
    format: str
    dtype: str
    pattern: str
    pruned: SizeRow
    others: tuple[SizeRow, ...]
    dense_layers: dict[str, str]
    nonzero_share: float
    files: dict[str, int]
    merge: MergeReport | None = None
    notes: tuple[str, ...] = ()
    uploaded: str | None = None

    @property
    def rows(self) -> tuple[SizeRow, ...]:
        """Every row of the table, the total last."""
        rows = (self.pruned, *(row for row in self.others if row.layers))
        layers, parameters, dense, stored = (
            sum(getattr(row, key) for row in rows) for key in ("layers", "parameters", "dense_bytes", "stored_bytes")
        )
        return *rows, SizeRow("total", layers, parameters, dense, stored)

    def lines(self) -> list[str]:
        """The table as text: sizes by section, what stayed dense and why, the files."""
        title = ("", "tensors", "parameters", f"dense {self.dtype}", "stored", "ratio")
        table = [title]
        for row in self.rows:
            sizes = (size_text(row.dense_bytes), size_text(row.stored_bytes))
            table.append((row.section, f"{row.layers:,}", f"{row.parameters:,}", *sizes, f"{row.ratio:.4f}"))
        widths = [max(len(cells[column]) for cells in table) for column in range(len(title))]
        lines = ["  ".join(_align(cells, widths)) for cells in table]
        lines.append(f"non-zero share of the pruned layers: {self.nonzero_share:.4f}")
        lines += self.notes
        reasons: dict[str, list[str]] = {}
        for name, reason in self.dense_layers.items():
            reasons.setdefault(reason, []).append(name)
        lines += [f"left dense: {len(names)} layers, e.g. {names[0]}: {reason}" for reason, names in reasons.items()]
        lines += [f"{size_text(size):>10}  {name}" for name, size in sorted(self.files.items())]
        lines += [] if self.merge is None else self.merge.lines()
        return lines


def file_sizes(folder: Path) -> dict[str, int]:
    """Size in bytes of every file of a folder, by its path there."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def _align(cells: tuple[str, ...], widths: list[int]) -> list[str]:
    first, *rest = zip(cells, widths, strict=True)
    return [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]


def size_text(count: int) -> str:
    """A size as readable text, in decimal units."""
    if count < 1000:
        return f"{count} B"
    value = float(count)
    for unit in ("kB", "MB", "GB", "TB"):
        value /= 1000
        if value < 1000 or unit == "TB":
            break
    return f"{value:.2f} {unit}"
