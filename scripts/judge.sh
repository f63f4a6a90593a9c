#!/usr/bin/env bash
# Judges attribution methods on the small testbed, emoji-mini, whose diffusion model is trained again from scratch.
#
#   bash scripts/judge.sh              two cores: an hour for teachers, methods and LDS, then a minute for each model that
#                                      leave-K-out lacks, about 20 for a method and a K; after Ctrl-C the same command goes on
#   SMOKE=1 bash scripts/judge.sh      LDS of untuned features by the losses that the repository ships, under runs/smoke
#
# Losses of the models on halves and without creators are shipped (results/retrain/losses.npz), so that only models of
# leave-K-out and their references are trained here, for the methods and K of `removed` and `levels` below.
# Writes data/emoji-mini/scores/*.npy and results/{lds,creators,removal,latency}/, from which README.md's tables are made.
# Expect: LDS about 0.67 for both terms of the finite step, 0 for random; ΔL of random removals far below the others'.
set -euo pipefail
# shellcheck source=scripts/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

features=(pixel effnet minilm effnet+minilm)
teachers=(finite-step finite-step@0.01 first-order second-order plain normalised)
nearest=(finite-step-knn plain-knn normalised-knn)
gradients=(trak journey-trak d-trak das abu abu-plus ekfac)
removed=(finite-step@0.01 tuned-minilm minilm abu-plus effnet+minilm) levels=(43)
mini=(--mode emoji-mini) ranker=runs/rankers-mini/minilm workers=(--workers "$(nproc)")
scores() { printf 'data/emoji-mini/scores/%s.npy\n' "$@"; }

step "emoji dataset" python -m feature_extraction.emoji "${mini[@]}"
step "latents" python -m abu.encode "${mini[@]}"
[ "${SMOKE:-0}" = 1 ] && features=(minilm)
for feature in "${features[@]}"; do
    step "features $feature" python -m feature_extraction.extract "${mini[@]}" --ftype "$feature"
done
if [ "${SMOKE:-0}" = 1 ]; then
    step "scores" python -m benchmark.methods random minilm
    mapfile -t found < <(scores random minilm)
    step "LDS" python -m benchmark.lds "${found[@]}" --output runs/smoke/lds.json
    exit
fi

step "stored losses" python -m benchmark.retrain restore
for stage in curvature queries "steps --passes 4" "training --passes 4" scores; do
    # shellcheck disable=SC2086
    step "teacher: $stage" python -m abu.collect $stage "${mini[@]}"
done
step "rankings" python -m benchmark.finite_step "${mini[@]}" --step 0.01
step "ranker" python train.py --mode emoji --data_dir data/emoji-mini --ftype minilm --half \
    --output $ranker.pth --run_dir $ranker
step "scores" python -m benchmark.methods random "${features[@]}" "${teachers[@]}" "${nearest[@]}"
step "influence that features predict" python -m benchmark.methods "${features[@]}" --influence finite-step@0.01
tuned=(tuned --ftype minilm --checkpoint $ranker.pth)
step "scores of the ranker" python -m benchmark.methods "${tuned[@]}"
step "influence that the ranker predicts" python -m benchmark.methods "${tuned[@]}" --influence finite-step@0.01
step "methods on gradients" python -m benchmark.methods "${gradients[@]}"
mapfile -t all < <(find data/emoji-mini/scores -maxdepth 1 -name '*.npy' | sort)
step "LDS" python -m benchmark.lds "${all[@]}"
step "creators" python -m benchmark.creators "${all[@]}"
step "latency" python -m benchmark.latency effnet+minilm minilm tuned d-trak abu-plus --ftype minilm \
    --checkpoint $ranker.pth
step "references" python -m benchmark.retrain reference "${workers[@]}"
mapfile -t judged < <(scores "${removed[@]}")
step "removals" python -m benchmark.removal run "${judged[@]}" --levels "${levels[@]}" "${workers[@]}"
step "effects of removals" python -m benchmark.removal report "${judged[@]}" --levels "${levels[@]}"
step "figures" python -m benchmark.figures
step "Table 1" python -m benchmark.table1
step "tables" python -m benchmark.tables
