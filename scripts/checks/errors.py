"""Which of the package's messages does no test trigger? Runs the tests and lists the messages that never came.

Each `UserError`, in the processes of pytest and in those that they start, records the line that made it. Test folders
run one after another. It takes somewhat longer than the tests with one worker.

    python scripts/checks/errors.py [--notes FOLDER] [TESTS ...]    # exit code 1 if a message was never triggered
"""

import argparse
import ast
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from scripts.provenance import provenance

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "ast_sparse"
HOOK = """
import os, sys
try:
    from ast_sparse import errors
except ImportError:  # not a program of ours
    errors = None
if errors is not None:
    made = errors.UserError.__init__
    def noted(self, *args, **kwargs):
        frame = sys._getframe(1)
        while frame is not None and "ast_sparse" not in frame.f_code.co_filename:
            frame = frame.f_back
        if frame is not None:  # an empty file: even a process that may not write any more can create it
            place = f"{os.path.realpath(frame.f_code.co_filename)}:{frame.f_lineno}".replace("/", "+")
            os.close(os.open(os.path.join(os.environ["RAISED"], place), os.O_CREAT))
        made(self, *args, **kwargs)
    errors.UserError.__init__ = noted
"""


def sites() -> dict[tuple[str, int, int], str]:
    """First and last line of every `UserError(...)` in the package, and how its message begins."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "UserError":
                message = ast.get_source_segment(source, node.args[0]) if node.args else None
                found[str(path), node.lineno, node.end_lineno or node.lineno] = " ".join((message or "").split())[:90]
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="*", type=Path, help="files and folders of tests; default: all")
    parser.add_argument("--notes", type=Path, help="folder for what was raised; a second run does only the rest")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        notes = args.notes or Path(folder) / "notes"
        notes.mkdir(exist_ok=True)
        commit, made_at = notes / "commit", provenance()["commit"]
        before = commit.read_text() if commit.exists() else "another commit" if any(notes.iterdir()) else made_at
        if before != made_at or (commit.exists() and made_at.endswith("+changes")):  # which may be other changes
            parser.error(f"--notes {notes} is of {before}, and lines may have moved. Name another one.")
        commit.write_text(made_at)
        (Path(folder) / "sitecustomize.py").write_text(HOOK)
        failed = [tests for tests in args.tests or parts() if not run(tests, Path(folder), notes)]
        places = [path.name.replace("+", "/").rsplit(":", 1) for path in notes.glob("*:*")]
    known = sites()
    missing = {
        site: text for site, text in known.items()
        if not any(file == site[0] and site[1] <= int(line) <= site[2] for file, line in places)
    }  # fmt: skip
    for (file, line, _), text in missing.items():
        print(f"never triggered: {Path(file).relative_to(ROOT)}:{line}  {text}")
    print(f"{len(known) - len(missing)} of {len(known)} messages were triggered")
    return int(bool(missing or failed))


def parts() -> list[Path]:
    """Test folders, and the test files beside them."""
    tests = ROOT / "tests"
    return sorted(path for path in tests.iterdir() if path.name.startswith("test_") or (path / "__init__.py").exists())


def run(tests: Path, folder: Path, notes: Path) -> bool:
    """Run some tests, unless the notes say that they were run; return whether they passed."""
    done = notes / str(tests.resolve()).replace("/", "+")
    if done.exists():
        return True
    path = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "RAISED": str(notes.resolve())}
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:xdist", str(tests)]
    finished = subprocess.run(command, env=environment, check=False, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    print(f"{tests}: {finished.stdout.splitlines()[-1] if finished.stdout else finished.returncode}", flush=True)
    if finished.returncode:
        print(finished.stdout[-3000:])
        return False
    done.touch()
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
