"""The format is registered whichever package is imported first, and ours does not import transformers for it."""

import pytest

from tests.export.sparse_models import run_python

KNOWN = """
import sys
from transformers.quantizers import auto
assert "ast_sparse_24" in auto.AUTO_QUANTIZER_MAPPING
assert "ast_sparse_24" in auto.AUTO_QUANTIZATION_CONFIG_MAPPING
assert not any(type(finder).__module__.startswith("ast_sparse") for finder in sys.meta_path)
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import ast_sparse; from transformers import AutoModelForCausalLM",
        "import ast_sparse; import transformers.quantizers.auto",
        "from transformers import AutoModelForCausalLM; import ast_sparse",
        "from ast_sparse import AstSparse24Config",
    ],
)
def test_format_is_registered_in_every_import_order(imports: str) -> None:
    run_python(f"import warnings; warnings.simplefilter('error', UserWarning)\n{imports}\n{KNOWN}")


def test_import_of_the_package_imports_neither_torch_nor_transformers() -> None:
    run_python("import sys, ast_sparse\nassert not {'torch', 'transformers'} & set(sys.modules)")


def test_a_failing_plugin_warns_and_leaves_transformers_alone() -> None:
    code = """
import sys, warnings
import ast_sparse
sys.modules["ast_sparse.export.quantizer"] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import transformers.quantizers.auto as auto
assert auto.AUTO_QUANTIZER_MAPPING and "ast_sparse_24" not in auto.AUTO_QUANTIZER_MAPPING
assert any("could not register" in str(warning.message) for warning in caught)
"""
    run_python(code)
