#!/usr/bin/env bash
# What a change must pass before it is committed: lint, format, types, the fast test suite. Stops at the first failure.
set -euo pipefail
cd "$(dirname "$0")/.."
python -m ruff check .
python -m ruff format --check .
python -m pyright
python -m pytest -q
