#!/usr/bin/env bash
# Linear datamodelling score on MSCOCO: the released model retrained on random halves of its training set (α = 0.5), the
# scores of the 110 test queries judged by the queries' losses under these models. Needs scripts/download_data.sh.
#
#   bash scripts/coco/lds.sh                   64 halves, each with two seeds: 128 models, one after the other
#   bash scripts/coco/lds.sh --workers 8       on 8 GPUs of this machine; --address of a Ray cluster for more
#   MODELS=16 bash scripts/coco/lds.sh         fewer halves
#   SMOKE=1 bash scripts/coco/lds.sh           a tiny model on made-up files of that layout, in a temporary folder
#
# Trained on no GPU so far. A model is 184,823 steps of 128 pictures, 0.42 EFLOP by count: at 30 to 60 TFLOP/s in
# bfloat16, which is our guess for an A100, 2 to 4 hours; so 250 to 500 GPU-hours. Every step reads 20 MB of token
# states: with less memory than their 93 GB the disk has to keep up. What is done is kept, and the same command goes on.
# Arguments go to the training (python -m benchmark.retrain --help).
# Writes results/coco/lds.json. Expect a ceiling well above 0, influence (AbU+) first, tuned features above untuned,
# random around 0; the paper gives no LDS of MSCOCO. With SMOKE=1 nothing is learnt and the numbers say nothing.
set -euo pipefail
# shellcheck source=scripts/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/../setup_env.sh"

root=. models=${MODELS:-64}
if [ "${SMOKE:-0}" = 1 ]; then
    root=$(mktemp -d) models=4
    trap 'rm -rf "$root"' EXIT
    step "made-up files" env PYTHONPATH=.:tests python tests/released_layout.py "$root" --trainable
fi
coco=(--mode coco --root "$root")

step "scores" python -m benchmark.coco_scores --root "$root"
for plan in halves again; do
    step "models on random halves: $plan" python -m benchmark.retrain "$plan" "${coco[@]}" --models "$models" "$@"
done
step "LDS" python -m benchmark.lds "$root"/data/coco/scores/*.npy "${coco[@]}" --models "$models" \
    --output "$root/results/coco/lds.json"
