#!/usr/bin/env bash
# Set up .venv, unless INSTALLED=1 says that it is, and run all tests; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
[ "${INSTALLED:-}" = 1 ] || bash scripts/install.sh dev
# worksteal keeps neighbouring tests together, so what a module builds for its tests is built once
exec .venv/bin/python -m pytest -n "${TEST_WORKERS:-2}" --dist worksteal "$@"
