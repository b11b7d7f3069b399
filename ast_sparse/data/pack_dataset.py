"""Pack a data set for SparseTrainer: no configuration, no held-out share, no report."""

import logging

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ast_sparse.data.blocks.packing import left_over, pack_tokens
from ast_sparse.data.tokens.bos import find_bos
from ast_sparse.data.tokens.chat import chat_columns, tokenise_conversations, uncounted_rows
from ast_sparse.data.tokens.tokenise import token_counts, tokenise_documents
from ast_sparse.errors import UserError

logger = logging.getLogger(__name__)


def pack_dataset(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, text_field: str, block_size: int, bos: str = "auto"
) -> Dataset:
    """Tokenise and pack a data set of raw text or chat data, for SparseTrainer.

    Documents are joined in order with one EOS after each, conversations as their template writes them. The number of
    tokens that do not fill a last block is logged.

    Args:
        bos: as in `data.bos`.

    Returns:
        Rows `{"input_ids": block_size token ids}`, with `labels` for chat data.

    Raises:
        UserError: no column `text_field`, a row without text, no EOS token, or less text than one block; also what
            `tokenise_conversations` raises.
    """
    found = find_bos(bos, tokenizer, "bos")
    is_chat = bool(chat_columns(dataset.column_names))
    if is_chat:
        tokenised = tokenise_conversations(dataset, tokenizer, "the data set", found.of_document)
    else:
        tokenised = tokenise_documents(dataset, tokenizer, text_field, "the data set", found)
    lengths = token_counts(tokenised)
    if is_chat and (line := uncounted_rows(lengths, "the data set")):
        logger.warning(line)
    total, starts = int(lengths.sum()), np.zeros_like(lengths)
    packed = pack_tokens(tokenised, starts, lengths, block_size, "the data set", found)
    if not len(packed):
        raise UserError(
            f"The data set has {total:,} tokens, fewer than one block of `block_size` = {block_size:,}. "
            "Give more text or lower `block_size`."
        )
    if leftover := left_over(tokenised, starts, lengths, block_size, "the data set", found):
        logger.warning(
            f"{total:,} tokens make {len(packed):,} blocks of {block_size:,}; the last {leftover:,} tokens "
            "do not fill a block and are left out."
        )
    return packed
