"""The released layout in small: its checkpoint, training on its files, and memory far below queries x images."""

from __future__ import annotations

import importlib
import json
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from released_layout import FTYPE, SMALL, ReleasedSize, write_released
from torch.utils._python_dispatch import TorchDispatchMode

from fastgda.attributor import FeatureAttributor
from fastgda.core import read_manifest
from fastgda.dataset import Split, hold_out, layout, load_images, load_split
from fastgda.evaluation import Candidate, evaluate
from fastgda.index import FlatIndex
from fastgda.metrics import average_precision
from fastgda.ranker import load_ranker
from fastgda.rankings import Rankings, load_rankings, save_rankings
from fastgda.recipes import TrainConfig
from fastgda.trainer import Trainer

TALL = ReleasedSize(images=20_000, dim=6, train_queries=400, candidates=50, test_queries=1, hidden=2, width=8)

train = importlib.import_module("train")
evaluation = importlib.import_module("eval")


def test_released_files_train_and_the_released_checkpoint_is_optimal(tmp_path):
    write_released(tmp_path, SMALL)
    common = ["--mode", "coco", "--ftype", FTYPE, "--data_dir", str(tmp_path), "--topk_values", "10", "40"]
    options = ["--recipe", "paper", "--epochs", "2", "--batch_size", "500", "--val_queries", "10"]
    sizes = ["--hidden_sizes", "16", "16", "16", "--out_feat_dim", "16"]
    files = ["--output", str(tmp_path / "ours.pth"), "--run_dir", str(tmp_path / "run")]
    assert train.main([*common, *options, *sizes, *files]) == 0
    checkpoints = [str(tmp_path / "weights" / f"{FTYPE}.pth"), str(tmp_path / "ours.pth")]
    assert evaluation.main([*common, "--checkpoint", *checkpoints, "--output", str(tmp_path / "report")]) == 0
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    optimal, ours = (row for row in rows if row["method"] == "tuned")
    assert min(optimal["mAP"].values()) > 0.999 and optimal["spearman"] > 0.999
    assert max(ours["mAP"].values()) < 0.9
    assert load_ranker(checkpoints[1]).config == replace(load_ranker(checkpoints[0]).config, dropout=0.1)


RELEASED_TRAINING = [
    *["--mode", "coco", "--ftype", FTYPE, "--train_size", "50", "--val_start", "50", "--val_end", "60"],
    *["--nn_cutoff", "60", "--prob_outlier", "0.2", "--random_seed", "1000", "--hidden_sizes", "16", "16", "16"],
    *["--dropout", "0.1", "--out_feat_dim", "16", "--epochs", "1", "--batch_size", "500", "--lr", "0.001"],
    *["--name", "coco_baseline", "--eval_after_train", "--topk_values", "40", "10"],
]


def test_the_released_commands_run_and_write_the_released_files(tmp_path, capsys):
    """Flags of the released train.py and eval.py; a CSV of k, mAP (k), std_err with six decimals."""
    write_released(tmp_path / "coco", SMALL)
    places = ["--data_dir", str(tmp_path / "coco"), "--output_dir", str(tmp_path / "checkpoints")]
    assert train.main([*RELEASED_TRAINING, *places, "--run_dir", str(tmp_path / "run")]) == 0
    ours = tmp_path / "checkpoints" / "coco_baseline.pth"
    config = json.loads(ours.with_name(ours.name + ".manifest.json").read_text())["config"]
    assert (config["train_queries"], config["val_queries"], config["candidates"]) == (50, 10, 60)
    assert (config["outlier_prob"], config["seed"], config["loss"], config["sampling"]) == (0.2, 1000, "bce", "pairs")
    check_released_table(tmp_path / "coco", ours, tmp_path / "checkpoints" / "coco_baseline_eval.csv")

    output = tmp_path / "results" / "eval.csv"
    command = ["--mode", "coco", "--data_dir", str(tmp_path / "coco"), "--topk_values", "10", "40"]
    architecture = ["--hidden_sizes", "16", "16", "16", "--dropout", "0.1", "--out_feat_dim", "16"]
    assert evaluation.main([*command, "--checkpoint", str(ours), "--output", str(output), *architecture]) == 0
    check_released_table(tmp_path / "coco", ours, output)
    assert "popularity" in output.with_name("eval_methods.csv").read_text()
    for wrong in (["--hidden_sizes", "16"], ["--out_feat_dim", "8"], ["--input_norm"]):
        assert evaluation.main([*command, "--checkpoint", str(ours), *wrong]) == 2
        assert f"coco_baseline.pth: expected {wrong[0]}" in capsys.readouterr().err


def check_released_table(data, checkpoint, table) -> None:
    """The CSV against a plain computation."""
    paths, ranker = layout("coco", FTYPE, data), load_ranker(checkpoint)
    images = load_images(paths)
    test = load_split(paths, "test", images)
    scores = (ranker.embed_queries(test.features) @ ranker.embed(images).T).numpy()
    lines = ["k,mAP (k),std_err"]
    for level in (10, 40):
        values = average_precision(scores, test.rankings.rank, [level])[:, 0]
        error = np.sqrt(np.mean((values - values.mean()) ** 2) / len(values))
        lines.append(f"{level},{values.mean():.6f},{error:.6f}")
    assert table.read_text().split() == "\n".join(lines).split()


def test_coco_has_the_released_defaults(tmp_path, capsys):
    args = train.parser_for("paper", "coco").parse_args([])
    assert (args.ftype, args.output_dir.name, args.wandb_project) == (FTYPE, "checkpoints", "fastgda")
    assert train.validation_rows(args) == (4900, 5000)
    write_released(tmp_path, SMALL)
    for more, message in (
        ([], "expected 0 < start < end <= the 60 queries, found 4900, 5000"),
        (["--val_start", "50", "--val_end", "60", "--train_size", "51"], "expected 1..50 training queries, found 51"),
        (["--val_start", "50", "--val_end", "60", "--nn_cutoff", "81"], "--nn_cutoff: expected 1..80 candidates"),
        (["--val_start", "50", "--val_end", "50"], "found 50, 50"),
        (["--output", str(tmp_path / "x.pth")], "--name: expected it without --output"),
    ):
        assert train.main(["--mode", "coco", "--name", "x", "--data_dir", str(tmp_path), *more]) == 2
        assert message in capsys.readouterr().err


def test_the_score_loss_trains_on_released_files(tmp_path, capsys):
    write_released(tmp_path, SMALL)
    command = ["--mode", "coco", "--data_dir", str(tmp_path), "--val_queries", "10", "--topk_values", "10", "40"]
    command += ["--loss", "score", "--hidden_sizes", "16", "--out_feat_dim", "16", "--epochs", "1"]
    command += ["--output", str(tmp_path / "r.pth"), "--run_dir", str(tmp_path / "run")]
    assert train.main(command) == 0
    rankings = load_rankings(tmp_path / "influence_train.pkl", SMALL.images)
    assert rankings.score is not None
    save_rankings(tmp_path / "influence_train.npz", Rankings(rankings.rank))
    capsys.readouterr()
    assert train.main([*command[:-1], str(tmp_path / "other")]) == 2
    assert "expected training rankings with the teacher's scores, found ranks only" in capsys.readouterr().err


def test_coco_writes_beside_the_released_ranker_not_over_it(tmp_path):
    parse = train.parser_for("paper", "coco").parse_args
    assert train.output_of(parse(["--output_dir", str(tmp_path)])) == tmp_path / f"{FTYPE}.pth"
    assert train.output_of(parse([])).parent.name == "checkpoints"
    assert train.output_of(parse(["--output", "x.pth"])).name == "x.pth"


def test_other_validation_rows_train_another_ranker(tmp_path, capsys):
    write_released(tmp_path, SMALL)
    command = ["--mode", "coco", "--data_dir", str(tmp_path), "--train_size", "40", "--topk_values", "10", "40"]
    command += ["--hidden_sizes", "16", "--out_feat_dim", "16", "--epochs", "1", "--batch_size", "500"]
    command += ["--output", str(tmp_path / "r.pth"), "--run_dir", str(tmp_path / "run")]
    for rows, repeated in ((("40", "50"), False), (("40", "50"), True), (("50", "60"), False)):
        assert train.main([*command, "--val_start", rows[0], "--val_end", rows[1]]) == 0
        assert ("up to date" in capsys.readouterr().out) == repeated
        assert read_manifest(tmp_path / "r.pth")["config"]["val_rows"] == list(map(int, rows))


@pytest.mark.parametrize("sign", [-1, 1])
def test_either_sign_of_scale_ranks_alike_everywhere(tmp_path, sign):
    """A legacy checkpoint, state dict only: evaluation, FAISS index and the demo's search order images by the rank."""
    write_released(tmp_path, SMALL)
    path = tmp_path / "weights" / f"{FTYPE}.pth"
    state = dict(torch.load(path, weights_only=True))
    state["scale"] = torch.tensor([sign * 5.0])
    torch.save(state, path)
    paths, ranker = layout("coco", FTYPE, tmp_path), load_ranker(path)
    images = load_images(paths)
    test = load_split(paths, "test", images)
    with torch.no_grad():
        left, right = (
            torch.nn.functional.normalize(ranker.mlp(torch.from_numpy(rows)), dim=1) for rows in (test.features, images)
        )
        # the logit of pi orders the images as pi does
        modelled = state["scale"].double() * (left @ right.T) + state["bias"]
    truth = torch.argsort(modelled, dim=1)[:, :20].numpy()

    document = evaluate([Candidate(FTYPE, paths, (path,))], "test", (10,))
    found = next(row for row in document["rows"] if row["method"] == "tuned")["mAP"]["10"]
    expected = average_precision(-modelled.numpy(), test.rankings.rank, [10]).mean()
    assert found == pytest.approx(expected, rel=1e-3) and (found > 0.99) == (sign < 0)

    index = FlatIndex.build(ranker.embed(images).numpy(), np.arange(len(images)))
    searched = index.search(ranker.embed_queries(test.features).numpy(), 20).ids
    attributor = FeatureAttributor.build(images, ranker)
    attributed = np.array([attributor.attribute(query, 20).ids for query in test.features])
    scores = modelled.numpy()
    for order in (searched, attributed):
        ranks = np.take_along_axis(scores, order, axis=1)
        np.testing.assert_allclose(ranks, np.take_along_axis(scores, truth, axis=1), atol=1e-5)


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize(
    "change",
    [
        {"sampling": "pairs", "batch_size": 4096},
        {"sampling": "blocks", "random_subset_size": 20, "subset": "resampled", "loss": "score", "target": "score"},
        {"sampling": "blocks", "random_subset_size": 20, "subset": "fixed", "loss": "listwise"},
    ],
)
def test_training_allocates_nothing_of_queries_times_images(tmp_path, change):
    """Features are mapped, rankings are integers [Q, K]: below one byte for each of 400 x 20,000 pairs."""
    write_released(tmp_path, TALL)
    paths = layout("coco", FTYPE, tmp_path)
    if change.get("loss") == "score":
        with_scores(paths.ranking("train"))
    pairs = TALL.train_queries * TALL.images
    config = TrainConfig(hidden_sizes=(8,), out_feat_dim=4, epochs=1, query_block=64, image_block=256, **change)

    def run(folder: str) -> tuple[np.ndarray, tuple[Split, Split]]:
        images = load_images(paths)
        splits = hold_out(load_split(paths, "train", images), 5)
        trainer = Trainer(config, images, *splits, levels=(10,), run_dir=tmp_path / folder, device=torch.device("cpu"))
        trainer.run(stop_after_steps=3)
        return images, splits

    run("first")  # what libraries import and cache at their first use is not the training's
    tracemalloc.start()
    try:
        with Largest() as largest:
            images, splits = run("second")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < pairs
    assert largest.elements < pairs / 40
    assert splits[0].rankings.rank.itemsize <= 4 and not images.flags.owndata


def with_scores(path) -> None:
    """Converts a pickle of ranks to .npz with scores."""
    rankings = load_rankings(path, TALL.images)
    score = np.broadcast_to(-np.arange(TALL.candidates, dtype=np.float32), rankings.rank.shape)
    save_rankings(path.with_suffix(".npz"), Rankings(rankings.rank, score))
