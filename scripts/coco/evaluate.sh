#!/usr/bin/env bash
# The paper's evaluation on MSCOCO: mAP(L) of untuned features and released rankers at L = 500, 1,000 and 4,000 over the
# 110 test queries, from the released files in data/coco (README, "Files of the released data").
#
#   bash scripts/coco/evaluate.sh              every feature type that has features and a ranker; writes results/coco/
#   SMOKE=1 bash scripts/coco/evaluate.sh      on made-up files in the same layout, under a temporary folder
#
# Needs no GPU; about 3 GiB of memory. Expect: tuned above untuned for every feature type; with SMOKE=1 a tuned mAP of 1,
# because the made-up ranker is the teacher.
set -euo pipefail
# shellcheck source=scripts/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/../setup_env.sh"

levels=(500 1000 4000) data=data/coco out=results/coco
if [ "${SMOKE:-0}" = 1 ]; then
    data=$(mktemp -d) levels=(5 10 40)
    trap 'rm -rf "$data"' EXIT
    out=$data/results
    step "made-up files in the released layout" env PYTHONPATH=.:tests python -c "
import sys
from pathlib import Path
from released_layout import ReleasedSize, write_released
write_released(Path(sys.argv[1]), ReleasedSize(images=1200, dim=24, train_queries=20, candidates=100, width=32))
" "$data"
fi

found=0
for folder in "$data"/feats/*/; do
    ftype=$(basename "$folder")
    checkpoint=$data/weights/$ftype.pth
    [ "${SMOKE:-0}" = 1 ] || checkpoint=weights/$ftype.pth
    [ -f "$checkpoint" ] || continue
    found=$((found + 1))
    step "$ftype" python eval.py --mode coco --data_dir "$data" --ftype "$ftype" --checkpoint "$checkpoint" \
        --topk_values "${levels[@]}" --output "$out/$ftype"
done
if [ "$found" = 0 ]; then
    echo "error: $data: expected feats/<ftype>/ with a ranker in weights/<ftype>.pth, found none" >&2
    exit 2
fi
