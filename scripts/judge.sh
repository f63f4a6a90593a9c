#!/usr/bin/env bash
# Judges attribution methods on the small testbed, emoji-mini, whose diffusion model is trained again from scratch.
#
#   bash scripts/judge.sh              two cores: three hours for teachers, methods, studies and LDS, then a minute for
#                                      each model that leave-K-out lacks, about 20 for a method and a K; after Ctrl-C
#                                      the same command goes on
#   SMOKE=1 bash scripts/judge.sh      LDS of untuned features by the losses that the repository ships, under runs/smoke
#
# Losses of all models trained so far are shipped (results/retrain/losses.npz), so that only the references are trained
# here and, for the methods and K of `removed`, `levels`, `few` and `other_levels` below, models of leave-K-out whose
# removed images are others than then: those of rankers, which another processor trains to other first images.
# Writes data/emoji-mini/scores/*.npy and results/{lds,creators,removal,calibration,latency}/, from which README.md's
# tables are made.
# Expect: LDS about 0.67 for both terms of the finite step, 0 for random; ΔL of random removals far below the others'.
set -euo pipefail
# shellcheck source=scripts/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

features=(pixel effnet minilm effnet+minilm)
teachers=(finite-step finite-step@0.01 first-order second-order plain normalised)
nearest=(finite-step-knn plain-knn normalised-knn)
gradients=(trak journey-trak d-trak das abu abu-plus ekfac)
removed=(finite-step@0.01 tuned-minilm minilm abu-plus das-selected tuned-das-effnet+minilm tuned-effnet+minilm
    effnet+minilm finite-step finite-step-knn exact d-trak-selected ekfac pixel effnet
    trak-selected journey-trak-selected abu)
levels=(43)
# other K, for one teacher and the ranker that comes nearest to it
few=(finite-step@0.01 tuned-das-effnet+minilm) other_levels=(5 11 126)
calibrated=(finite-step@0.01 tuned-minilm-influence minilm-influence pixel-influence first-order das-selected)
mini=(--mode emoji-mini) rankers=runs/rankers-mini workers=(--workers "$(nproc)")
scores() { printf 'data/emoji-mini/scores/%s.npy\n' "$@"; }
train() { # name, feature type, flags
    step "ranker $1" python train.py --mode emoji --data_dir data/emoji-mini --ftype "$2" --half "${@:3}" \
        --output "$rankers/$1.pth" --run_dir "$rankers/$1"
}

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
step "references" python -m benchmark.retrain reference "${workers[@]}"
for stage in curvature queries "steps --passes 4" "training --passes 4" scores; do
    # shellcheck disable=SC2086
    step "teacher: $stage" python -m abu.collect $stage "${mini[@]}"
done
exact=(python -m abu.collect_exact all "${mini[@]}" "${workers[@]}")
for alpha in 0.001 0.003 0.01 0.03 0.1 1; do
    step "the exact form, α = $alpha" "${exact[@]}" --split val --step $alpha \
        --folder data/emoji-mini/cache/exact_val@$alpha
done
step "the exact form" "${exact[@]}" --split test --step 0.003
step "rankings" python -m benchmark.finite_step "${mini[@]}" --step 0.01
step "first-order rankings" python -m benchmark.teacher "${mini[@]}"
train minilm minilm
train effnet+minilm effnet+minilm --lr 3e-4
train first-order-minilm minilm --lr 3e-4 --rank_file data/emoji-mini/influence_plain_train.npz \
    --val_rank_file data/emoji-mini/influence_plain_val.npz
step "scores" python -m benchmark.methods random "${features[@]}" "${teachers[@]}" "${nearest[@]}"
for split in val test; do
    map=(--split $split --influence finite-step@0.01)
    step "influence that features predict" python -m benchmark.methods "${features[@]}" "${map[@]}"
    for feature in minilm effnet+minilm; do
        tuned=(tuned --ftype $feature --checkpoint $rankers/$feature.pth)
        step "scores of the ranker" python -m benchmark.methods "${tuned[@]}" --split $split
        step "influence that the ranker predicts" python -m benchmark.methods "${tuned[@]}" "${map[@]}"
    done
done
step "scores of the first order's ranker" python -m benchmark.methods tuned --ftype minilm \
    --checkpoint $rankers/first-order-minilm.pth --name tuned-first-order-minilm
step "scores of the exact form" python -m benchmark.methods exact
step "validation scores" python -m benchmark.methods "${teachers[@]}" --split val
step "methods on gradients" python -m benchmark.methods "${gradients[@]}"
step "the same with λ by validation" python -m benchmark.methods trak journey-trak d-trak das --select
step "AbU+ of the squared output" python -m benchmark.methods abu-plus --measure square --damping 0.001 \
    --name abu-plus-square
for study in step exact layers squares damping strata bins draws measured; do
    step "study: $study" python -m benchmark.lds_study --study $study
done
for split in train val; do
    step "DAS as a teacher: $split queries" python -m benchmark.methods das --select --split $split
done
step "its rankings" python -m benchmark.distil das-selected
learn=(--rank_file data/emoji-mini/influence_das-selected_train.npz)
learn+=(--val_rank_file data/emoji-mini/influence_das-selected_val.npz)
for feature in "${features[@]}"; do
    train das-$feature $feature --lr 3e-4 "${learn[@]}"
    tuned=(tuned --ftype $feature --checkpoint $rankers/das-$feature.pth)
    step "scores of its ranker" python -m benchmark.methods "${tuned[@]}" --name tuned-das-$feature
    step "influence that it predicts" python -m benchmark.methods "${tuned[@]}" --influence das-selected \
        --name tuned-das-$feature-influence
done
mapfile -t all < <(find data/emoji-mini/scores -maxdepth 1 -name '*.npy' | sort)
step "LDS" python -m benchmark.lds "${all[@]}" --add
step "creators" python -m benchmark.creators "${all[@]}" --add
step "latency" python -m benchmark.latency effnet+minilm minilm trak journey-trak d-trak abu abu-plus ekfac exact \
    finite-step@0.01
for ftype in minilm effnet+minilm; do
    step "latency of the ranker on $ftype" python -m benchmark.latency tuned --ftype $ftype \
        --checkpoint $rankers/$ftype.pth
done
for method in d-trak das; do
    step "latency of $method" python -m benchmark.latency $method --name $method-selected
done
step "latency of its ranker" python -m benchmark.latency tuned --ftype effnet+minilm \
    --checkpoint $rankers/das-effnet+minilm.pth --name tuned-das-effnet+minilm
mapfile -t judged < <(scores "${removed[@]}")
mapfile -t fewer < <(scores "${few[@]}")
step "removals" python -m benchmark.removal run "${judged[@]}" --levels "${levels[@]}" "${workers[@]}"
step "removals, other K" python -m benchmark.removal run "${fewer[@]}" --levels "${other_levels[@]}" "${workers[@]}"
step "effects of removals" python -m benchmark.removal report "${judged[@]}" --add \
    --levels "${levels[@]}" "${other_levels[@]}"
mapfile -t calibrated < <(scores "${calibrated[@]}")
step "calibration" python -m benchmark.calibration "${calibrated[@]}"
step "figures" python -m benchmark.figures
step "Table 1" python -m benchmark.table1
step "tables" python -m benchmark.tables
