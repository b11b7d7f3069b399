"""The format is registered whichever package is imported first, and ours does not import transformers for it."""

import subprocess
import sys

import pytest

from tests.processes import run_python

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
        "from transformers import AutoModelForCausalLM; import ast_sparse",
        "from ast_sparse import AstSparse24Config",
    ],
)
def test_format_is_registered_in_every_import_order(imports: str) -> None:
    run_python(f"import warnings; warnings.simplefilter('error', UserWarning)\n{imports}\n{KNOWN}")


def test_import_of_the_package_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, ast_sparse; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)  # with nothing imported


@pytest.mark.parametrize(
    "imports",
    [
        "import transformers.quantizers.auto; import ast_sparse",
        "import ast_sparse; import transformers.quantizers.auto",
    ],
)
def test_the_plugin_is_imported_when_a_checkpoint_asks_for_it(imports: str) -> None:
    code = f"""
import warnings; warnings.simplefilter("error", UserWarning)
{imports}
{KNOWN}
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AutoHfQuantizer, AutoQuantizationConfig
assert "ast_sparse.export.quantizer" not in sys.modules
config = AutoQuantizationConfig.from_dict({{"quant_method": "ast_sparse_24", "modules": ["a"], "dequantize": False}})
from ast_sparse.export.quantizer import AstSparse24Config, CompressedHfQuantizer
assert type(config) is AstSparse24Config and config.modules == ["a"] and not config.dequantize
assert type(AutoHfQuantizer.from_config(config)) is CompressedHfQuantizer
assert AUTO_QUANTIZER_MAPPING["ast_sparse_24"] is CompressedHfQuantizer
"""
    run_python(code)


def test_a_quantizer_may_be_asked_for_first() -> None:
    code = """
import ast_sparse
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
quantizer = AUTO_QUANTIZER_MAPPING["ast_sparse_24"](ast_sparse.AstSparse24Config(["a"]))
assert type(quantizer).__name__ == "CompressedHfQuantizer"
"""
    run_python(code)


def test_a_failing_plugin_leaves_transformers_alone_until_a_checkpoint_needs_it() -> None:
    code = """
import sys
import ast_sparse
sys.modules["ast_sparse.export.quantizer"] = None
from transformers.quantizers.auto import AutoQuantizationConfig
try:
    AutoQuantizationConfig.from_dict({"quant_method": "ast_sparse_24"})
except ImportError as error:
    assert "ast_sparse could not import its reader" in str(error) and "pyproject.toml" in str(error)
else:
    raise AssertionError
"""
    run_python(code)


def test_tables_that_transformers_no_longer_has_are_a_warning() -> None:
    code = """
import sys, types, warnings
sys.modules["transformers.quantizers.auto"] = types.ModuleType("auto")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import ast_sparse
assert any("could not register its checkpoint format" in str(warning.message) for warning in caught)
"""
    run_python(code)
