#!/usr/bin/env bash
# Trains the ranker on every feature of the testbed with the best recipe, and with the paper's; writes the tables.
#
#   bash scripts/train_rankers.sh              about 25 minutes on two cores
#   SMOKE=1 bash scripts/train_rankers.sh      one epoch each, to see that everything runs; tables under runs/smoke
#
# Writes weights/emoji_effnet+minilm.pth, runs/rankers/*.pth, and in results/ranker: features.{csv,json} (untuned against
# tuned, judged by the teacher of a finite step), recipes.{csv,json} and recipes_plain.{csv,json} (the best recipe against
# the paper's: first-order AbU+, K-NN candidates, binary cross-entropy; judged by the finite step and by the first order).
# The paper's pairs are drawn in blocks of queries x images, as the best recipe's are: one by one they would take an hour.
# A ranker that is up to date is not trained again; after Ctrl-C the same command goes on.
# Expect: tuned above untuned for every feature, and effnet+minilm above its parts.
set -euo pipefail
# shellcheck source=scripts/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

features=(pixel effnet minilm effnet+minilm)
main=effnet+minilm
if [ "${SMOKE:-0}" = 1 ]; then
    rankers=runs/smoke/rankers results=runs/smoke/ranker shipped=runs/smoke/rankers/$main.pth length=(--epochs 1)
else
    rankers=runs/rankers results=results/ranker shipped=weights/emoji_$main.pth length=()
fi

step "emoji dataset" python -m feature_extraction.emoji
checkpoints=()
for feature in "${features[@]}"; do
    step "features $feature" python -m feature_extraction.extract --mode emoji --ftype "$feature"
    output=$rankers/$feature.pth
    [ "$feature" = "$main" ] && output=$shipped
    step "ranker on $feature" python train.py --ftype "$feature" --half ${length[@]+"${length[@]}"} \
        --output "$output" --run_dir "$rankers/$feature"
    checkpoints+=("$output")
done
plain=data/emoji/influence_plain
step "ranker on $main, the paper's recipe" python train.py --ftype "$main" --recipe paper \
    --sampling blocks --epochs 60 --val_every 5 ${length[@]+"${length[@]}"} \
    --rank_file "${plain}_train.npz" --val_rank_file "${plain}_val.npz" \
    --output "$rankers/paper.pth" --run_dir "$rankers/paper"

step "features, untuned against tuned" python eval.py --ftype "${features[@]}" --checkpoint "${checkpoints[@]}" \
    --output "$results/features"
step "recipes, judged by the finite step" python eval.py --ftype "$main" --checkpoint "$shipped" "$rankers/paper.pth" \
    --output "$results/recipes"
step "recipes, judged by the first order" python eval.py --ftype "$main" --checkpoint "$shipped" "$rankers/paper.pth" \
    --rank_file "${plain}_test.npz" --train_rank_file "${plain}_train.npz" --output "$results/recipes_plain"
