"""Plain text tables, for every command that prints results."""

import re
from collections.abc import Sequence


def format_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Lay out a table: columns two spaces apart, a rule under the headers, numeric columns right-aligned.

    Args:
        rows: the cells; floats are shown with two decimals, integers with thousands separators, None as a dash.

    Raises:
        ValueError: a row does not have as many cells as there are headers.
    """
    cells = [[shown(cell) for cell in row] for row in rows]
    columns = list(zip(headers, *cells, strict=True)) if cells else [(header,) for header in headers]
    widths = [max(map(len, column)) for column in columns]
    numeric = [bool(rows) and all(_is_numeric(row[index]) for row in rows) for index in range(len(headers))]
    lines = [_line(headers, widths, numeric), "  ".join("-" * width for width in widths)]
    lines.extend(_line(row, widths, numeric) for row in cells)
    return "\n".join(line.rstrip() for line in lines)


def _line(cells: Sequence[str], widths: Sequence[int], numeric: Sequence[bool]) -> str:
    return "  ".join(
        cell.rjust(width) if is_number else cell.ljust(width)
        for cell, width, is_number in zip(cells, widths, numeric, strict=True)
    )


def shown(cell: object) -> str:
    """A cell as tables show it."""
    if cell is None:
        return "-"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, float):
        return f"{cell:,.2f}"
    return f"{cell:,}" if isinstance(cell, int) else str(cell)


def _is_numeric(cell: object) -> bool:
    if isinstance(cell, str):  # a number formatted by the caller: 12.5%, 1,024, 3.2 MB
        return cell[:1].isdigit() or (cell[:1] in "+-" and cell[1:2].isdigit()) or cell in ("-", "nan", "inf")
    return cell is None or (isinstance(cell, (int, float)) and not isinstance(cell, bool))


def layer_kind(name: str) -> str:
    """The name of a layer without the number of its block, such as `model.layers.*.mlp.up_proj`."""
    return re.sub(r"\.\d+\.", ".*.", name)
