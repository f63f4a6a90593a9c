#!/usr/bin/env bash
# From a fresh clone to the browser demo: packages, emoji dataset, features, ranker, table, demo.
#
#   bash scripts/quickstart.sh                       serves http://127.0.0.1:7860 at the end
#   bash scripts/quickstart.sh --no-serve            stops after the table
#   SMOKE=1 bash scripts/quickstart.sh --no-serve    trains two epochs only, to see that everything runs
#
# Writes results/quickstart/ (with SMOKE=1 results/quickstart-smoke/): ranker.pth, eval.csv, eval.json.
# Every step is skipped when its output is there and its manifest matches; after Ctrl-C the same command goes on.
# Expect at the end: in the table, "tuned" above "untuned" at every L.
set -euo pipefail
usage="usage: [SMOKE=1] bash scripts/quickstart.sh [--no-serve]"
serve=true
for argument in "$@"; do
    case $argument in
        --no-serve) serve=false ;;
        -h | --help) echo "$usage" && exit ;;
        *) echo "error: $argument: expected no other argument than --no-serve; $usage" >&2 && exit 2 ;;
    esac
done
# shellcheck source=scripts/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

features=effnet+minilm
if [ "${SMOKE:-0}" = 1 ]; then
    name=quickstart-smoke length=(--epochs 2 --val_every 1)
else
    name=quickstart length=()
fi
out=results/$name

step "emoji dataset" python -m feature_extraction.emoji
step "features $features" python -m feature_extraction.extract --mode emoji --ftype "$features"
step "ranker" python train.py --mode emoji --ftype "$features" ${length[@]+"${length[@]}"} \
    --output "$out/ranker.pth" --run_dir "runs/$name"
step "held-out queries: untuned against tuned" python eval.py --mode emoji --ftype "$features" \
    --checkpoint "$out/ranker.pth" --output "$out/eval"
if $serve; then
    echo
    exec python demo.py --ftype "$features" --checkpoint "$out/ranker.pth"
fi
