"""The data sets of a run as packed blocks, made from whatever SparseTrainer is given."""

from dataclasses import dataclass
from typing import Any, Literal

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ast_sparse.data.blocks.collator import document_borders
from ast_sparse.data.blocks.counted import with_counted_tokens
from ast_sparse.data.blocks.domains import DomainBlocks
from ast_sparse.data.pack_dataset import pack_dataset
from ast_sparse.data.sources.conversations import chat_columns
from ast_sparse.data.tokens.bos import NO_BOS, find_bos
from ast_sparse.errors import UserError
from ast_sparse.evaluation.perplexity import max_positions

_LONGEST_BLOCK = 1024  # unless `block_size` says otherwise


def block_length(block_size: int | None, *models: Any) -> int:
    """Tokens of a block: `block_size`, or by default the positions of student and teacher, at most 1024.

    Raises:
        UserError: `block_size` is more than the positions of a model.
    """
    limits = [max_positions(model.config) for model in models if getattr(model, "config", None) is not None]
    limit = min((limit for limit in limits if limit is not None), default=None)
    if block_size is not None and limit is not None and block_size > limit:
        raise UserError(
            f"block_size={block_size} is longer than the {limit} positions of the model or its teacher. "
            f"Set it to {limit} or less."
        )
    return block_size or min(_LONGEST_BLOCK, limit or _LONGEST_BLOCK)


@dataclass(frozen=True, kw_only=True)
class RunBlocks:
    """Packed blocks of a run.

    Attributes:
        train: to train on; `DomainBlocks` if there are domains.
        held_out: to evaluate on, a mapping if each part is evaluated; or None.
        calibration: to calibrate one-shot pruning on, not packed yet; False for none.
    """

    train: Any
    held_out: Any
    calibration: Any


class BlockMaker:
    """Makes packed blocks from raw text and chat data.

    Args:
        tokenizer: None if all data have `input_ids`.
        text_field: the column of raw text.
        block_size: tokens of a block.
        packing, bos: as in SparseTrainer.

    Attributes:
        front: the BOS tokens at the start of each block; may be empty.

    Raises:
        UserError: `bos` is not a valid choice, or the tokenizer has no BOS.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        text_field: str,
        block_size: int,
        packing: Literal["joined", "documents"],
        bos: str,
    ) -> None:
        self.tokenizer = tokenizer
        self.text_field = text_field
        self.block_size = block_size
        self.packing = packing
        self.bos = bos
        self.front = (NO_BOS if tokenizer is None else find_bos(bos, tokenizer, "bos")).of_block

    def of_run(self, train: Any, held_out: Any, calibration: Any, makes_labels: bool) -> RunBlocks:
        """The blocks of a run, without those that have no counted token.

        Args:
            calibration: None for the training data.
            makes_labels: the data collator makes its own labels, so no block is left out.
        """
        train, held_out = self.pack(train), self.pack(held_out)
        if isinstance(train, dict):
            train = DomainBlocks(train)
        calibration = train if calibration is None else calibration
        if not makes_labels:
            borders = document_borders(self.tokenizer, self.packing, self.bos)
            train = with_counted_tokens(train, "train_dataset", borders)
            held_out = with_counted_tokens(held_out, "eval_dataset", borders)
        if isinstance(held_out, DomainBlocks):  # Trainer evaluates a mapping part by part
            held_out = held_out.parts
        return RunBlocks(train=train, held_out=held_out, calibration=calibration)

    def pack(self, dataset: Any) -> Any:
        """As `as_blocks`."""
        return as_blocks(dataset, self.tokenizer, self.text_field, self.block_size, self.bos)


def as_blocks(
    dataset: Any, tokenizer: PreTrainedTokenizerBase | None, text_field: str, block_size: int, bos: str = "auto"
) -> Any:
    """A data set of raw text or chat data as packed blocks; anything that has `input_ids` is returned as it is.

    Raises:
        UserError: there is no tokenizer, the data set is not a `datasets.Dataset`, or as in `pack_dataset`.
    """
    if isinstance(dataset, dict):
        return {name: as_blocks(part, tokenizer, text_field, block_size, bos) for name, part in dataset.items()}
    columns = getattr(dataset, "column_names", None) or []
    chat = chat_columns(columns)
    if "input_ids" in columns or not (chat or text_field in columns):
        return dataset
    what = f"chat data ({', '.join(chat)})" if chat else f"raw text ({text_field!r})"
    if tokenizer is None:
        raise UserError(f"The data set has {what} and there is no tokenizer. Pass processing_class.")
    if not isinstance(dataset, Dataset):
        raise UserError(
            f"A {type(dataset).__name__} of {what} cannot be packed here. Tokenise it to `input_ids` first, "
            "or pass a datasets.Dataset."
        )
    return pack_dataset(dataset, tokenizer, text_field, block_size, bos)
