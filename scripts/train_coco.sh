#!/usr/bin/env bash
# Trains the paper's ranker on the released MSCOCO rankings, dino+clip_text features, and evaluates it.
#
#   bash scripts/train_coco.sh             needs scripts/download_data.sh; never timed whole, see below
#   SMOKE=1 bash scripts/train_coco.sh     on made-up files of the same layout, to see that everything runs; 11 s
#
# Ten epochs are 119,630 steps of 4,096 pairs, drawn one by one as in the paper. On two cores that also had other work,
# 72 such steps (20,000 made-up images, 1,280 numbers each) took 1 to 4 s, 2.4 on average: at that rate 80 hours. On a
# GPU it has not been timed.
# Writes checkpoints/coco_baseline.pth and checkpoints/coco_baseline_eval.csv (k, mAP (k), std_err). Arguments go to
# train.py, for instance --sampling blocks, which trains many times faster. After Ctrl-C the same command goes on.
# Expect at the end: in the table, "tuned" above "untuned" at every L; not with SMOKE=1, which trains for 16 steps.
set -euo pipefail
# shellcheck source=scripts/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

if [ "${SMOKE:-0}" = 1 ]; then
    SMOKE=1 bash scripts/download_data.sh
    size=(--data_dir runs/smoke/released/data/coco --output_dir runs/smoke/released/checkpoints --run_dir runs/smoke/coco
        --train_size 50 --val_start 50 --val_end 60 --nn_cutoff 80 --hidden_sizes 16 16 16 --out_feat_dim 16
        --epochs 2 --batch_size 500 --topk_values 10 40)
else
    size=(--train_size 4900 --val_start 4900 --val_end 5000 --nn_cutoff 10000 --hidden_sizes 768 768 768
        --out_feat_dim 768 --epochs 10 --batch_size 4096 --topk_values 500 1000 4000)
fi
step "ranker" python train.py --mode coco --ftype dino+clip_text "${size[@]}" --prob_outlier 0.1 --dropout 0.1 \
    --lr 0.001 --name coco_baseline --eval_after_train "$@"
