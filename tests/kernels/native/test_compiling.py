"""The C kernels are compiled once into a cache; what goes wrong is one line."""

import ctypes
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ast_sparse.kernels.native import compiling
from ast_sparse.kernels.native.compiling import BuildError, cache_folder, library_file, package_library, packaged_name

SEVEN = '__attribute__((visibility("default"))) int seven(void) { return 7; }\n'


@pytest.fixture(autouse=True)
def small_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source that compiles in a moment, and an empty cache."""
    source = tmp_path / "src"
    source.mkdir()
    (source / "seven.c").write_text(SEVEN)
    monkeypatch.setattr(compiling, "SOURCES", source)
    monkeypatch.setattr(compiling, "__file__", str(tmp_path / "compiling.py"))
    monkeypatch.setenv("AST_SPARSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    return source


def test_a_library_is_compiled_once_and_nothing_else_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = library_file()
    assert ctypes.CDLL(str(file)).seven() == 7
    monkeypatch.setattr(compiling, "_compile", None)  # a second call would fail
    assert library_file() == file
    assert list((tmp_path / "cache").iterdir()) == [file]


def test_other_sources_make_another_library(small_source: Path) -> None:
    file = library_file()
    (small_source / "seven.c").write_text(SEVEN.replace("7", "8"))
    assert library_file() != file
    assert ctypes.CDLL(str(library_file())).seven() == 8


def test_a_library_in_the_package_needs_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packaged = tmp_path / packaged_name()
    packaged.write_bytes(library_file().read_bytes())
    monkeypatch.setenv("PATH", "")
    assert library_file() == packaged


def test_compiling_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        file = library_file()
        library_file()
    assert [each.getMessage() for each in caplog.records] == [f"Compiling the C kernels to {file}: some seconds, once."]


def test_several_processes_may_compile_at_once(tmp_path: Path) -> None:
    code = (
        "import sys, ctypes, pathlib; from ast_sparse.kernels.native import compiling; "
        "compiling.SOURCES = pathlib.Path(sys.argv[1]); print(compiling.library_file()); "
        "assert ctypes.CDLL(str(compiling.library_file())).seven() == 7"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "src")]
    with ThreadPoolExecutor() as pool:
        done = list(pool.map(lambda _: subprocess.run(command, capture_output=True, text=True), range(3)))
    assert [each.returncode for each in done] == [0] * 3, done
    assert len({each.stdout for each in done}) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_an_assembler_without_amx_costs_only_that_level(small_source: Path) -> None:
    old = "#ifndef AST24_NO_AMX\n#error no such instruction: tileloadd\n#endif\n"
    (small_source / "seven.c").write_text(old + SEVEN)
    assert ctypes.CDLL(str(library_file())).seven() == 7


def test_without_a_compiler_there_is_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BuildError, match=r"^no C compiler \(cc, gcc, clang\) was found$"):
        library_file()


def test_a_compiler_that_was_named_is_not_replaced_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "nowhere-cc -m64")
    with pytest.raises(BuildError, match=r"^CC=nowhere-cc -m64 was not found$"):
        library_file()


def test_a_compiler_whose_quotes_do_not_close_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "gcc 'x")
    with pytest.raises(BuildError, match=r"^CC=gcc 'x cannot be read \(No closing quotation\)$"):
        library_file()


def test_what_the_compiler_says_is_told_in_one_line(small_source: Path, tmp_path: Path) -> None:
    (small_source / "seven.c").write_text(SEVEN.replace("7", "eight"))
    with pytest.raises(BuildError, match=r"^cc fails: .*seven\.c.*error: .*eight") as raised:
        library_file()
    assert "\n" not in str(raised.value)
    assert not list((tmp_path / "cache").iterdir())


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AST_SPARSE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(BuildError, match=r"file/cache cannot be written \(Not a directory\); set AST_SPARSE"):
        library_file()


def test_a_cache_in_the_current_folder_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AST_SPARSE_CACHE", ".")
    assert ctypes.CDLL(str(library_file())).seven() == 7  # a name without a folder would be searched elsewhere


def test_a_cache_that_cannot_be_entered_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)
    monkeypatch.setattr(compiling, "packaged_name", lambda: "none.so")
    monkeypatch.setattr(Path, "exists", lambda self: self.name != "none.so" and denied())
    with pytest.raises(BuildError, match=r"cache cannot be written \(Permission denied\); set AST_SPARSE_CACHE"):
        library_file()


def test_without_a_home_folder_the_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AST_SPARSE_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda _: {}["no such user"])
    with pytest.raises(BuildError, match=r"^there is no home folder for the cache; set AST_SPARSE_CACHE to a folder$"):
        library_file()


def test_the_cache_is_where_other_programs_have_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AST_SPARSE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "ast_sparse"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "ast_sparse"
    assert not os.path.exists(tmp_path / "home")


def test_a_wheel_takes_a_library_only_from_a_cache_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, file = library_file(), tmp_path / "wheel.so"
    monkeypatch.delenv("AST_SPARSE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "cache").rename(tmp_path / "home" / "ast_sparse")
    library_file().write_bytes(b"damaged")
    package_library(file)
    assert ctypes.CDLL(str(file)).seven() == 7
    monkeypatch.setenv("AST_SPARSE_CACHE", str(tmp_path / "named"))
    library_file()
    monkeypatch.setattr(compiling, "_compile", None)
    package_library(tmp_path / "again.so")
    assert (tmp_path / "again.so").read_bytes() == (tmp_path / "named" / compiled.name).read_bytes()


def test_a_cache_that_cannot_be_read_does_not_stop_a_wheel(tmp_path: Path) -> None:
    cached = library_file()
    cached.unlink()
    cached.mkdir()  # as a file that may not be read, also for root
    package_library(tmp_path / "wheel.so")
    assert ctypes.CDLL(str(tmp_path / "wheel.so")).seven() == 7
