"""Token rows as a batch: labels, padding, and the borders of documents that are kept apart."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ast_sparse.data.tokens.bos import find_bos
from ast_sparse.data.tokens.tokenise import eos_token
from ast_sparse.distillation.logits import IGNORE_INDEX
from ast_sparse.errors import UserError

DOMAIN = "domain_index"  # column of a row of a mixture: the number of its domain

Borders = tuple[int, int | None]  # the tokens that documents end and begin with; None: no BOS


def document_borders(tokenizer: PreTrainedTokenizerBase | None, packing: str, bos: str = "auto") -> Borders | None:
    """The tokens that documents end and begin with (None: no BOS); None if they are not kept apart."""
    if tokenizer is None or packing != "documents":
        return None
    return eos_token(tokenizer), next(iter(find_bos(bos, tokenizer).tokens), None)


class CausalLMCollator:
    """Stack token rows into a batch; labels are the inputs unless a row has its own.

    transformers' `DataCollatorForLanguageModeling` masks every label equal to the pad token: with pad = EOS, the usual
    choice for GPT-2 or LLaMA, a model would never learn to end a document. Here only padding is ignored.

    Args:
        pad_token_id: fills rows on the right if lengths differ; with None such a batch is refused.
        document_end: the token that ends documents, which are then kept apart: positions begin at 0 in every document,
            which transformers' attention masks treat as its border, and its first token is not a label. `position_ids`
            of a row take precedence over the token. With None documents are not kept apart.
        document_begin: BOS, if documents or blocks begin with it. It may be the token that ends documents (OPT).
    """

    def __init__(
        self, pad_token_id: int | None = None, document_end: int | None = None, document_begin: int | None = None
    ) -> None:
        self.pad_token_id = pad_token_id
        self.document_end = document_end
        self.document_begin = document_begin

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Make a batch.

        Args:
            features: rows with `input_ids` and maybe `labels` and `attention_mask`: lists or tensors of equal length.

        Returns:
            int64 `[batch, longest]`: `input_ids`, `labels` (-100 on padding), and `attention_mask` only if lengths
            differ or a row has one; `position_ids` if documents are kept apart; `domain_index`, `[batch]`, if the rows
            have it.

        Raises:
            UserError: lengths differ and there is no pad token or documents are kept apart; or a row differs in
                length from its labels or mask.
        """
        rows = [_long(feature["input_ids"]) for feature in features]
        length = max(map(len, rows))
        is_ragged = any(len(row) != length for row in rows)
        if is_ragged and self.pad_token_id is None:
            raise UserError(
                "Rows of different lengths need padding, but the tokenizer has no pad token. Set `pad_token`."
            )
        labels = [
            _column(feature, "labels", row, _unpadded(feature, row))
            for feature, row in zip(features, rows, strict=True)
        ]
        batch = {
            "input_ids": _padded(rows, length, self.pad_token_id or 0),
            "labels": _padded(labels, length, IGNORE_INDEX),
        }
        if is_ragged or any(feature.get("attention_mask") is not None for feature in features):
            masks = [
                _column(feature, "attention_mask", row, torch.ones_like(row))
                for feature, row in zip(features, rows, strict=True)
            ]
            batch["attention_mask"] = _padded(masks, length, 0)
        if all(DOMAIN in feature for feature in features):
            batch[DOMAIN] = _long([feature[DOMAIN] for feature in features])
        return batch if self.document_end is None else self._apart(batch, features, self.document_end)

    def _apart(
        self, batch: dict[str, Tensor], features: Sequence[Mapping[str, Any]], document_end: int
    ) -> dict[str, Tensor]:
        if "attention_mask" in batch:
            raise UserError(
                "data.packing='documents' needs blocks of one length without padding, but these rows differ in length "
                "or have an attention_mask. Pass packed blocks or raw text, or set data.packing='joined'."
            )
        place = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
        ends = torch.eq(batch["input_ids"], document_end)
        if self.document_begin == document_end:
            # BOS is the second of two in a row, or a single one at the start of the block: no document ends there.
            before = torch.cat([~ends[:, 1:2], ends[:, :-1]], dim=1)
            ends = ends & ~before
        ends = ends[:, :-1]
        begins = F.pad(ends, (1, 0), value=True)
        positions = place - torch.where(begins, place, 0).cummax(dim=1).values
        for row, feature in enumerate(features):
            if feature.get("position_ids") is not None:
                positions[row] = _long(feature["position_ids"])
        labels = batch["labels"].masked_fill(positions == 0, IGNORE_INDEX)
        return {**batch, "labels": labels, "position_ids": positions}


def _long(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.long)


def _column(feature: Mapping[str, Any], name: str, row: Tensor, default: Tensor) -> Tensor:
    values = feature.get(name)
    if values is None:
        return default
    values = _long(values)
    if len(values) != len(row):
        raise UserError(f"A row has {len(row)} `input_ids` but {len(values)} `{name}`: the lengths must agree.")
    return values


def _unpadded(feature: Mapping[str, Any], row: Tensor) -> Tensor:
    """The row as its own labels, ignored where its attention mask is 0."""
    return row.masked_fill(_column(feature, "attention_mask", row, torch.ones_like(row)) == 0, IGNORE_INDEX)


def _padded(rows: list[Tensor], length: int, fill: int) -> Tensor:
    return torch.stack([F.pad(row, (0, length - len(row)), value=fill) for row in rows])


def make_collator(tokenizer: PreTrainedTokenizerBase | None, packing: str, bos: str = "auto") -> CausalLMCollator:
    """The collator of a run; with packing `documents` it marks where documents begin."""
    pad = tokenizer.pad_token_id if tokenizer is not None else None
    end, begin = document_borders(tokenizer, packing, bos) or (None, None)
    return CausalLMCollator(pad, end, begin)
