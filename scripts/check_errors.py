"""Which of the package's messages does the test suite trigger? Runs the tests and lists every place that raises one.

Each `UserError`, in this process of pytest and in those that it starts, writes down the line that made it.

    python scripts/check_errors.py [ARGUMENTS OF PYTEST]    # exit code 1 if a message was never triggered
"""

import ast
import os
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "ast_sparse"
HOOK = """
import os, sys
try:
    from ast_sparse import errors
except ImportError:  # another program than ours
    errors = None
if errors is not None:
    made = errors.UserError.__init__
    def noted(self, *args, **kwargs):
        frame = sys._getframe(1)
        while frame is not None and "ast_sparse" not in frame.f_code.co_filename:
            frame = frame.f_back
        if frame is not None:
            with open(os.environ["RAISED"], "a") as file:
                print(frame.f_code.co_filename, frame.f_lineno, sep=":", file=file)
        made(self, *args, **kwargs)
    errors.UserError.__init__ = noted
"""


def sites() -> dict[tuple[str, int, int], str]:
    """First and last line of every `UserError(...)` of the package, and how its message begins."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "UserError":
                text = " ".join((ast.get_source_segment(source, node.args[0]) if node.args else "").split())
                found[str(path), node.lineno, node.end_lineno or node.lineno] = text[:90]
    return found


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "sitecustomize.py").write_text(HOOK)
        raised = Path(folder) / "raised"
        raised.touch()
        path = os.pathsep.join([folder, str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "RAISED": str(raised)}
        tests = subprocess.run([sys.executable, "-m", "pytest", "-q", *arguments], env=environment, check=False)
        lines = {tuple(line.rsplit(":", 1)) for line in raised.read_text().splitlines()}
    places = {(str(Path(file).resolve()), int(line)) for file, line in lines}
    known = sites()
    missing = {
        site: text for site, text in known.items()
        if not any(file == str(Path(site[0]).resolve()) and site[1] <= line <= site[2] for file, line in places)
    }  # fmt: skip
    for (file, line, _), text in missing.items():
        print(f"never triggered: {Path(file).relative_to(PACKAGE.parent)}:{line}  {text}")
    print(f"{len(known) - len(missing)} of {len(known)} messages were triggered")
    return int(bool(missing) or tests.returncode != 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
