#!/usr/bin/env bash
# Evaluates the released ranker on the released MSCOCO test queries: mAP(L) at L = 500, 1,000 and 4,000.
#
#   bash scripts/eval_coco.sh              needs scripts/download_data.sh; a minute on two cores
#   SMOKE=1 bash scripts/eval_coco.sh      on made-up files of the same layout, to see that everything runs; 7 s
#
# Writes results/dino+clip_text.csv (k, mAP (k), std_err), results/dino+clip_text_methods.csv and .json (untuned features
# and baselines beside it). Arguments go to eval.py.
# Expect at the end: in the table, "tuned" above "untuned" at every L; with SMOKE=1 1.000, for that ranker is optimal.
set -euo pipefail
# shellcheck source=scripts/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

ftype=dino+clip_text
if [ "${SMOKE:-0}" = 1 ]; then
    SMOKE=1 bash scripts/download_data.sh
    released=runs/smoke/released
    places=(--data_dir "$released/data/coco" --checkpoint "$released/weights/$ftype.pth"
        --output "$released/results/$ftype.csv" --topk_values 10 40)
else
    places=(--checkpoint "weights/$ftype.pth" --output "results/$ftype.csv" --topk_values 500 1000 4000)
fi
step "released ranker on the test queries" python eval.py --mode coco --ftype "$ftype" "${places[@]}" "$@"
