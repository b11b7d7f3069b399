"""Versions of the libraries that made a file."""

import torch
import transformers

import ast_sparse


def versions() -> dict[str, str]:
    """Versions of this package, torch and transformers."""
    return {
        "ast_sparse": ast_sparse.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
