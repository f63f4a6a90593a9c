#!/usr/bin/env bash
# Downloads the released data and rankers of the paper's MSCOCO experiment: Hugging Face dataset sywang/FastGDA.
#
#   bash scripts/download_data.sh              about 15 GB, and room for the images twice while they are unpacked
#   bash scripts/download_data.sh --dry_run    what is missing; downloads nothing
#   SMOKE=1 bash scripts/download_data.sh      made-up files of the same layout, under runs/smoke/released; 5 s
#
# Arguments go to python -m fastgda.download. Writes data/coco/ (features, rankings, queries, COCO images) and weights/.
# Files that are there with their size are skipped; after Ctrl-C or a refusal by the hub the same command goes on.
# Expect at the end: "files of the release are there".
set -euo pipefail
# shellcheck source=scripts/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

if [ "${SMOKE:-0}" = 1 ]; then
    hub=runs/smoke/released/hub
    [ -d "$hub" ] || step "made-up release" env PYTHONPATH=. python tests/released_layout.py "$hub" --hub
    places=(--source "$hub" --data_dir runs/smoke/released/data --weights_dir runs/smoke/released/weights)
else
    places=()
fi
step "released data" python -m fastgda.download ${places[@]+"${places[@]}"} "$@"
