#!/usr/bin/env bash
# Checks the repository: lint, format, types, tests. Arguments go to pytest: bash scripts/test.sh -k rankings
#
# Under 10 minutes on two cores once the packages are installed (scripts/setup_env.sh).
# Expect at the end: "== pytest: done" and exit status 0.
set -euo pipefail
# shellcheck source=scripts/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" --dev

if ! command -v chromium >/dev/null; then
    echo "note: no Chromium on the PATH: the browser test is skipped (Debian, Ubuntu: apt-get install chromium)" >&2
fi
step "ruff check" ruff check
step "ruff format" ruff format --check
step "mypy" mypy
step "pytest" python -m pytest "$@"
