#!/usr/bin/env bash
# Creates .venv with the pinned packages and activates it; does nothing when it is already as requirements/ says.
#
#   bash scripts/setup_env.sh           what the pipeline and the demo need
#   bash scripts/setup_env.sh --dev     linters and test tools too
#
# Other scripts source it, which also changes to the repository's root and defines `step`.
# With nothing cached: 2 to 3 minutes and 7 GB (PyTorch for Linux brings its CUDA libraries along). Afterwards: no time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# step TITLE COMMAND...: says what is done, does it, says how long it took
step() {
    local title=$1 began=$SECONDS
    shift
    printf '\n== %s\n' "$title"
    "$@" || { local code=$?; printf '== %s: failed after %d s\n' "$title" $((SECONDS - began)) >&2; return $code; }
    printf '== %s: done in %d s\n' "$title" $((SECONDS - began))
}

find_python() {
    local candidate
    for candidate in python3.11 python3; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: PATH: expected Python 3.11 as python3.11 or python3, found $(python3 --version 2>/dev/null || echo none)" >&2
    return 2
}

create_environment() {
    local python
    python=$(find_python) || return 2
    "$python" -m venv .venv || {
        echo "error: .venv: $python -m venv failed; where Python is split into packages, install its venv part" >&2
        return 2
    }
}

# install_requirements NAME: installs requirements/NAME.txt and keeps a copy of it in .venv, the stamp of a whole installation
install_requirements() {
    local list=requirements/$1.txt stamp=.venv/installed-$1.txt verbosity=--quiet
    [ -t 1 ] && verbosity=--progress-bar=on
    rm -f "$stamp"
    .venv/bin/python -m pip install "$verbosity" --disable-pip-version-check --no-input -r "$list" &&
        cp "$list" "$stamp.new" && mv "$stamp.new" "$stamp"
}

[ -x .venv/bin/pip ] || step "Python environment in .venv" create_environment
needed=(lock)
[ "${1:-}" = --dev ] && needed+=(dev)
command -v npm >/dev/null || needed+=(node)
for name in "${needed[@]}"; do
    cmp -s "requirements/$name.txt" ".venv/installed-$name.txt" ||
        step "packages of requirements/$name.txt" install_requirements "$name"
done
# shellcheck disable=SC1091
source .venv/bin/activate
# where progress bars go to a file, a line every 15 s is enough
[ -t 2 ] || export TQDM_MININTERVAL=15
