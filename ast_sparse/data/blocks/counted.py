"""Which rows have a token that the loss counts; those that have none are left out of training."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from datasets.fingerprint import Hasher

from ast_sparse.data.blocks.collator import Borders
from ast_sparse.data.blocks.domains import DomainBlocks
from ast_sparse.distillation.logits import IGNORE_INDEX
from ast_sparse.errors import UserError

logger = logging.getLogger(__name__)

_FORMAT_VERSION = 1  # part of the fingerprint: raise it when different rows are left out
_ROWS_PER_BATCH = 1024


def counted_tokens(rows: Dataset, borders: Borders | None = None) -> np.ndarray:
    """How many tokens of each row the loss counts: int64 `[rows]`.

    The first token of a row is never predicted, and a label of −100 does not count. If documents are kept apart, the
    first token of each does not count either.

    Args:
        rows: `input_ids`, and perhaps `labels` and `position_ids`.
        borders: the tokens that documents end and begin with (None: no BOS), as in `CausalLMCollator`; None if
            documents are not kept apart.
    """
    names = [name for name in ("input_ids", "labels", "position_ids") if name in rows.column_names]
    tables = rows.select_columns(names).with_format("arrow").iter(_ROWS_PER_BATCH)
    found = [_of_table(table, borders) for table in tables]
    return np.concatenate(found) if found else np.empty(0, dtype=np.int64)


def _of_table(table: pa.Table, borders: Borders | None) -> np.ndarray:
    ids = table.column("input_ids")
    lengths = _lengths(ids)
    first = np.cumsum(lengths) - lengths
    is_counted = np.ones(int(lengths.sum()), dtype=bool)
    is_counted[first[lengths > 0]] = False
    labels, has_labels = _values(table, "labels", lengths)
    is_counted[has_labels] &= labels != IGNORE_INDEX
    if borders is not None:
        begins = np.roll(_ends(_flat(ids), first[lengths > 0], *borders), 1)
        positions, has_positions = _values(table, "position_ids", lengths)
        begins[has_positions] = positions == 0
        is_counted &= ~begins
    totals = np.concatenate([[0], np.cumsum(is_counted)])
    return (totals[first + lengths] - totals[first]).astype(np.int64)


def _ends(ids: np.ndarray, first: np.ndarray, end: int, begin: int | None) -> np.ndarray:
    """Where documents end, by the rule of `CausalLMCollator`. `first`: the indices of the first tokens of rows."""
    ends = ids == end
    if begin == end:
        before = np.roll(ends, 1)
        before[first] = ~np.roll(ends, -1)[first]
        ends &= ~before
    return ends


def _values(table: pa.Table, name: str, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values of a column that may be missing or null, and which tokens have one.

    A row that has more or fewer values than tokens counts as one without: the collator refuses it.
    """
    if name not in table.column_names:
        return np.empty(0, dtype=np.int64), np.zeros(int(lengths.sum()), dtype=bool)
    column = table.column(name)
    fits = (_lengths(column) == lengths) & column.is_valid().to_numpy()
    return _flat(column.filter(pa.array(fits))), np.repeat(fits, lengths)


def _lengths(column: pa.ChunkedArray) -> np.ndarray:
    return pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int64)


def _flat(column: pa.ChunkedArray) -> np.ndarray:
    return pc.list_flatten(column).to_numpy()


def nothing_counted(name: str, rows: int) -> str:
    """The error if no row has a counted token."""
    return (
        f"{name}: none of {rows:,} block{'' if rows == 1 else 's'} has a token that the loss counts: all labels are "
        "−100, so nothing can be learned or measured. Give rows with longer answers and shorter prompts, or more rows; "
        "if you made `labels` yourself, correct them."
    )


def with_counted_tokens(dataset: Any, name: str, borders: Borders | None = None, says: bool = True) -> Any:
    """Leave out the rows without a counted token; if every row has one, return the data set itself.

    This looks at a `datasets.Dataset`, a list of rows, domains, and a mapping of names to these. Anything else is
    returned as it is.

    Args:
        name: what messages call the data.
        borders: as in `counted_tokens`.
        says: log how many are left out.

    Raises:
        UserError: no row of a data set has one.
    """
    if isinstance(dataset, Mapping):
        return {key: with_counted_tokens(part, f"{name} {key!r}", borders, says) for key, part in dataset.items()}
    if isinstance(dataset, DomainBlocks):
        parts = with_counted_tokens(dataset.parts, name, borders, says)
        return dataset if all(parts[key] is part for key, part in dataset.parts.items()) else DomainBlocks(parts)
    if isinstance(dataset, Dataset) and "input_ids" in dataset.column_names:
        if borders is None and "labels" not in dataset.column_names:
            return dataset
        kept = np.flatnonzero(counted_tokens(dataset, borders))
    elif isinstance(dataset, list) and all(isinstance(row, dict) for row in dataset):
        kept = np.flatnonzero([_is_counted(row) for row in dataset])
    else:
        return dataset
    if len(kept) == len(dataset):
        return dataset
    if not len(kept):
        raise UserError(nothing_counted(name, len(dataset)))
    if says:
        logger.warning(
            f"{name}: {len(dataset) - len(kept):,} of {len(dataset):,} blocks have no token that the loss counts and "
            "are left out."
        )
    if isinstance(dataset, list):
        return [dataset[index] for index in kept]
    fingerprint = Hasher.hash((_FORMAT_VERSION, "counted", dataset._fingerprint, kept.tobytes()))
    return dataset.select(kept, new_fingerprint=fingerprint)


def _is_counted(row: dict[str, Any]) -> bool:
    labels = row.get("labels")
    return labels is None or bool((np.asarray(labels)[1:] != IGNORE_INDEX).any())
