"""train.py and eval.py in-process on the planted problem: report, files, resumption, bad input."""

from __future__ import annotations

import csv
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
from planted import LEVELS, write_planted

from fastgda.core import manifest_path, save_npy, write_manifest
from fastgda.dataset import normalise
from fastgda.index import Index, SegmentConfig, Source, load_embedding
from fastgda.index.__main__ import main as index_command
from fastgda.metrics import average_precision
from fastgda.ranker import load_ranker
from fastgda.rankings import load_rankings, popularity

train = importlib.import_module("train")
evaluation = importlib.import_module("eval")

QUICK = [
    *["--hidden_sizes", "--out_feat_dim", "16", "--no-residual", "--input_norm", "none", "--dropout", "0"],
    *["--init_scale", "-8", "--lr", "0.01", "--query_block", "30", "--image_block", "240"],
    *["--epochs", "40", "--val_every", "20"],
]
LS = ["--topk_values", *map(str, LEVELS)]


@pytest.fixture
def world(tmp_path) -> Path:
    """A data folder in the layout of the emoji testbed."""
    write_planted(tmp_path / "data")
    return tmp_path


def train_arguments(world: Path, *more: str) -> list[str]:
    files = ["--output", str(world / "r.pth"), "--run_dir", str(world / "run")]
    return ["--ftype", "planted", "--data_dir", str(world / "data"), *files, *LS, *QUICK, *more]


def eval_arguments(world: Path, *more: str) -> list[str]:
    return ["--ftype", "planted", "--data_dir", str(world / "data"), *LS, *more]


def test_train_then_evaluate(world, capsys):
    write_manifest(world / "data/influence_test.npz", {}, command="test", reliability={str(LEVELS[0]): 0.9})
    assert train.main(train_arguments(world, "--eval_after_train")) == 0
    printed = capsys.readouterr().out
    document = json.loads((world / "run/eval.json").read_text())
    by_method = {row["method"]: row for row in document["rows"]}
    assert list(by_method) == ["untuned", "tuned", "popularity", "chance", "teacher's reliability"]
    for level in map(str, LEVELS):
        tuned, untuned = by_method["tuned"], by_method["untuned"]
        assert tuned["mAP"][level] > 2 * untuned["mAP"][level] > 2 * by_method["chance"]["mAP"][level]
        assert tuned["gain"][level] == pytest.approx(tuned["mAP"][level] - untuned["mAP"][level])
        assert tuned["gain"][level] > 5 * tuned["gain_standard_error"][level]
        assert f"{tuned['mAP'][level]:.3f} ± {tuned['standard_error'][level]:.3f}" in printed
    assert by_method["teacher's reliability"]["mAP"] == {str(LEVELS[0]): 0.9}
    assert document["environment"]["packages"]["torch"]
    with open(world / "run/eval.csv") as handle:
        lines = list(csv.DictReader(handle))
    assert {(line["method"], line["L"]) for line in lines} >= {("tuned", str(level)) for level in LEVELS}
    log = json.loads((world / "run/log.json").read_text())
    assert [entry["epoch"] for entry in log["history"] if "mAP" in entry] == [0, 20, 40]
    assert load_ranker(world / "r.pth").info == {"ftype": "planted"}

    before = (world / "r.pth").stat().st_mtime_ns
    assert train.main(train_arguments(world)) == 0
    assert "up to date" in capsys.readouterr().out
    assert (world / "r.pth").stat().st_mtime_ns == before

    assert evaluation.main(eval_arguments(world, "--checkpoint", str(world / "r.pth"))) == 0
    again = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.startswith("tuned")] == [
        line for line in again.splitlines() if line.startswith("tuned")
    ]


def write_index(path, vectors, checkpoint=None):
    ranker = load_embedding(checkpoint, unit=checkpoint is None)[2]
    Index.create(path, Source([vectors]), SegmentConfig(), ranker=ranker, command="test")


def test_index_and_values_per_query(world, capsys):
    """A flat index retrieves as exact search does; the CSV's means over queries are the report's."""
    images = np.load(world / "data/feats/planted/data_feats.npy")
    assert train.main(train_arguments(world, "--epochs", "1", "--loss", "ordinal")) == 0
    ranker = load_ranker(world / "r.pth")
    assert ranker.config.heads == 9
    write_index(world / "r.index", ranker.embed(images).numpy(), world / "r.pth")
    more = ["--checkpoint", str(world / "r.pth"), "--index", str(world / "r.index"), "--output", str(world / "report")]
    assert evaluation.main(eval_arguments(world, *more, "--per_query", str(world / "queries.csv"))) == 0
    document = json.loads((world / "report.json").read_text())
    by_method = {row["method"]: row for row in document["rows"]}
    exact, index = by_method["tuned"], by_method["index"]
    for name in ("mAP", "recall", "ndcg", "overlap", "interval"):
        for level in map(str, LEVELS):
            assert index[name][level] == pytest.approx(exact[name][level], abs=2e-3)
    with open(world / "queries.csv") as handle:
        lines = list(csv.DictReader(handle))
    assert len(lines) == 4 * 30 * len(LEVELS)
    for row in (by_method["untuned"], exact, by_method["popularity"]):
        for level in map(str, LEVELS):
            mine = [line for line in lines if (line["method"], line["L"]) == (row["method"], level)]
            assert [int(line["query"]) for line in mine] == list(range(30))
            means = {key: np.mean([float(line[key]) for line in mine]) for key in ("AP", "recall@100", "NDCG@10")}
            assert means["AP"] == pytest.approx(row["mAP"][level])
            assert means["recall@100"] == pytest.approx(row["recall"][level]["100"])
            assert means["NDCG@10"] == pytest.approx(row["ndcg"][level]["10"])
            low, high = row["interval"][level]
            assert low < means["AP"] < high

    shallow = eval_arguments(world, *more[:4], "--index_depth", "50", "--output", str(world / "shallow"))
    assert evaluation.main(shallow) == 0
    rows = json.loads((world / "shallow.json").read_text())["rows"]
    found = next(row for row in rows if row["method"] == "index")
    level = str(LEVELS[0])
    assert found["recall"][level]["10"] == pytest.approx(exact["recall"][level]["10"], abs=1e-2)
    scores = (ranker.embed_queries(np.load(world / FEATURES / "test_query_feats.npy")) @ ranker.embed(images).T).numpy()
    scores[scores < np.sort(scores, axis=1)[:, -50:-49]] = -9
    truth = load_rankings(world / "data/influence_test.npz", 600).rank
    assert found["mAP"][level] == pytest.approx(average_precision(scores, truth, LEVELS)[:, 0].mean(), abs=2e-3)
    capsys.readouterr()
    write_index(world / "other.index", images[:-1])
    assert evaluation.main(eval_arguments(world, "--index", str(world / "other.index"))) == 2
    assert "an index of the 600 training images, found one of 599" in capsys.readouterr().err


def test_an_index_of_another_ranker_is_refused(world, capsys):
    images = np.load(world / "data/feats/planted/data_feats.npy")
    assert train.main(train_arguments(world, "--epochs", "1")) == 0
    ranker = load_ranker(world / "r.pth")
    write_index(world / "r.index", ranker.embed(images).numpy(), world / "r.pth")
    write_index(world / "untuned.index", normalise(images))
    checkpoint = ["--checkpoint", str(world / "r.pth")]
    for index, more in (("untuned", checkpoint), ("r", [])):
        capsys.readouterr()
        assert evaluation.main(eval_arguments(world, *more, "--index", str(world / f"{index}.index"))) == 2
        assert f"{index}.index: expected an index of the ranker" in capsys.readouterr().err


def test_unreadable_pictures_come_last_by_every_method(world, capsys):
    """As rows of zeros in the features, and left out of the index."""
    images = np.load(world / FEATURES / "data_feats.npy")
    gone = np.arange(600) % 10 == 3
    images[gone] = 0
    save_npy(world / FEATURES / "data_feats.npy", images)
    assert train.main(train_arguments(world, "--epochs", "1", "--input_norm", "layer")) == 0
    features, checkpoint = world / FEATURES / "data_feats.npy", ["--checkpoint", str(world / "r.pth")]
    assert index_command(["build", str(world / "r.index"), "--vectors", str(features), *checkpoint]) == 0
    assert "left out     60 rows" in capsys.readouterr().out
    more = [*checkpoint, "--index", str(world / "r.index"), "--output", str(world / "report")]
    assert evaluation.main(eval_arguments(world, *more)) == 0
    rows = {row["method"]: row for row in json.loads((world / "report.json").read_text())["rows"]}
    truth, asked = load_rankings(world / "data/influence_test.npz", 600).rank, np.load(world / QUERIES)
    ranker = load_ranker(world / "r.pth")
    for method, scores in (
        ("untuned", normalise(asked) @ normalise(images).T),
        ("tuned", (ranker.embed_queries(asked) @ ranker.embed(images).T).numpy()),
        ("index", (ranker.embed_queries(asked) @ ranker.embed(images).T).numpy()),
        ("popularity", np.tile(popularity(load_rankings(world / RANKS, 600), 600).astype(np.float32), (30, 1))),
    ):
        scores[:, gone] = -9
        expected = average_precision(scores, truth, LEVELS).mean(axis=0)
        np.testing.assert_allclose(list(rows[method]["mAP"].values()), expected, atol=1e-4)


def test_an_index_of_other_ids_is_refused(world, capsys):
    source = Source([normalise(np.load(world / FEATURES / "data_feats.npy"))], np.arange(1, 601))
    Index.create(world / "x", source, SegmentConfig(), ranker="cosine", command="test")
    assert evaluation.main(eval_arguments(world, "--index", str(world / "x"))) == 2
    assert "--index: expected training ids below 600, found 600" in capsys.readouterr().err


def test_untuned_comparison_of_feature_types(world, capsys, rng):
    features = world / "data/feats/noise"
    for name, rows in (("data_feats", 600), ("test_query_feats", 30)):
        save_npy(features / f"{name}.npy", rng.standard_normal((rows, 5)).astype(np.float32))
    output = world / "report.csv"
    arguments = eval_arguments(world, "--output", str(output))
    assert evaluation.main(["--ftype", "planted", "noise", *arguments[2:]]) == 0
    document = json.loads(output.with_suffix(".json").read_text())
    assert [(row["method"], row.get("ftype")) for row in document["rows"][:2]] == [
        ("untuned", "planted"),
        ("untuned", "noise"),
    ]
    assert "teacher's reliability" not in capsys.readouterr().out


def test_an_untrained_ranker_is_named(world, capsys):
    assert train.main(train_arguments(world, "--epochs", "1", "--lr", "1e-12")) == 0
    assert f"warning: {world / 'r.pth'} holds the untrained ranker" in capsys.readouterr().err
    assert train.main(train_arguments(world, "--seed", "1")) == 0
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("output", "written"),
    [
        ("v1.2", ["v1.2.csv", "v1.2.json"]),
        ("v1.2.csv", ["v1.2.csv", "v1.2.json"]),
        ("report.json", ["report.csv", "report.json"]),
    ],
)
def test_dots_in_the_name_of_a_report_stay(world, files_in, output, written):
    assert evaluation.main(eval_arguments(world, "--output", str(world / "out" / output))) == 0
    assert files_in(world / "out") == written


def test_table_without_the_baseline(world, capsys):
    assert train.main(train_arguments(world, "--epochs", "1")) == 0
    capsys.readouterr()
    assert evaluation.main(eval_arguments(world, "--checkpoint", str(world / "r.pth"), "--no-baseline")) == 0
    printed = capsys.readouterr().out
    assert "untuned" not in printed and "\ntuned" in printed


def test_held_out_queries_and_train_size(world):
    (world / "data/influence_val.npz").unlink()
    options = ("--val_queries", "30", "--train_size", "40", "--epochs", "1", "--val_every", "1")
    assert train.main(train_arguments(world, *options)) == 0
    config = json.loads(manifest_path(world / "r.pth").read_text())["config"]
    assert (config["train_queries"], config["val_queries"]) == (40, 30)


def test_paper_recipe_has_the_papers_defaults(capsys):
    args = train.parser_for("paper").parse_args([])
    assert (args.hidden_sizes, args.out_feat_dim, args.dropout) == ((768, 768, 768), 768, 0.1)
    assert (args.loss, args.sampling, args.outlier_prob) == ("bce", "pairs", 0.1)
    assert (args.epochs, args.batch_size, args.lr, args.weight_decay) == (10, 4096, 1e-3, 0.01)
    assert train.parser_for("paper").parse_args(["--input_norm", "--lr", "1"]).input_norm == "layer"
    with pytest.raises(SystemExit) as stopped:
        train.main(["--help"])
    assert stopped.value.code == 0
    assert "bce on normalised ranks (eq. 3)" in " ".join(capsys.readouterr().out.split())


def test_an_abbreviated_recipe_is_refused(world, capsys):
    """It would be read too late to decide the defaults."""
    with pytest.raises(SystemExit) as stopped:
        train.main(train_arguments(world, "--recip", "paper"))
    assert stopped.value.code == 2 and "unrecognized arguments: --recip paper" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mode", "rankings"), [("emoji", "python -m benchmark.teacher"), ("coco", "bash scripts/download_data.sh")]
)
def test_what_is_missing_names_the_command_that_makes_it(world, capsys, mode, rankings):
    command = ["--mode", mode, *train_arguments(world, "--sampling", "blocks")]
    for missing, made_by in (
        (RANKS, rankings),
        (f"{FEATURES}/data_feats.npy", f"python -m feature_extraction.extract --mode {mode} --ftype planted"),
    ):
        (world / missing).unlink()
        assert train.main(command) == 2
        assert capsys.readouterr().err.endswith(f"{missing}: expected a file, found nothing; make it with: {made_by}\n")


def overwrite(path: Path, change) -> None:
    save_npy(path, change(np.load(path)))


def with_nan(array: np.ndarray) -> np.ndarray:
    array[7, 2] = np.nan
    return array


FEATURES, RANKS = "data/feats/planted", "data/influence_train.npz"
QUERIES = f"{FEATURES}/test_query_feats.npy"


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda w: (w / FEATURES / "data_feats.npy").unlink(), "data_feats.npy: expected a file, found nothing"),
        (lambda w: overwrite(w / FEATURES / "data_feats.npy", with_nan), "NaN or infinity in 1 rows: 7"),
        (
            lambda w: overwrite(w / FEATURES / "val_query_feats.npy", lambda a: np.where(a == a, np.inf, a)),
            "val_query_feats.npy: expected finite numbers, found NaN or infinity in 20 rows: 0, 1, 2, 3",
        ),
        (lambda w: overwrite(w / FEATURES / "train_query_feats.npy", lambda a: a[:0]), "rows of float features"),
        (lambda w: overwrite(w / FEATURES / "val_query_feats.npy", lambda a: a[:0]), "rows of float features"),
        (lambda w: overwrite(w / FEATURES / "data_feats.npy", lambda a: a[:-5]), "training ids 0 to 594"),
        (
            lambda w: overwrite(w / FEATURES / "train_query_feats.npy", lambda a: a[:-5]),
            "influence_train.npz: expected rankings of 145 queries",
        ),
        (lambda w: overwrite(w / FEATURES / "train_query_feats.npy", lambda a: a[:, :-1]), "expected shape [*, 24]"),
        (lambda w: overwrite(w / FEATURES / "val_query_feats.npy", lambda a: a.astype(int)), "rows of float features"),
        (lambda w: (w / RANKS).write_bytes((w / RANKS).read_bytes()[:900]), "influence_train.npz: expected a whole"),
        (lambda w: (w / "data/influence_val.npz").unlink(), "influence_val.npz: expected a file, found nothing"),
    ],
)
def test_training_on_damaged_input_is_one_clear_line(world, capsys, damage, expected):
    damage(world)
    assert train.main(train_arguments(world)) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("error: ") and expected in error[0]
    assert not (world / "r.pth").exists() and not (world / "run").exists()


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--train_size", "151"], "--train_size: expected 1..150 training queries, found 151"),
        (["--val_queries", "150"], "expected to hold out 1..149 of 150 queries"),
        (["--epochs", "0"], "--epochs: expected a positive number"),
        (["--topk_values", "700"], "every L of mAP(L) in 1..600"),
        (["--sampling", "pairs"], "--loss listwise: expected --sampling blocks"),
    ],
)
def test_impossible_flags(world, capsys, more, expected):
    assert train.main(train_arguments(world, *more)) == 2
    assert expected in capsys.readouterr().err


def test_evaluation_refuses_what_does_not_fit(world, capsys):
    assert train.main(train_arguments(world, "--epochs", "1")) == 0
    other = world / "data/feats/other"
    for name, rows, width in (("data_feats", 600, 24), ("test_query_feats", 30, 24)):
        save_npy(other / f"{name}.npy", np.ones((rows, width), np.float32))
    checkpoint = ["--checkpoint", str(world / "r.pth")]
    for arguments, expected in (
        (
            ["--ftype", "other", *eval_arguments(world)[2:], *checkpoint],
            "expected a ranker of other, found one of planted",
        ),
        (["--ftype", "planted", "other", "x", *eval_arguments(world)[2:], *checkpoint], "one for each of the 3"),
        (eval_arguments(world, "--checkpoint", str(world / "none.pth")), "none.pth: expected a file"),
        (eval_arguments(world, "--train_rank_file", str(world / "none.npz")), "none.npz: expected"),
        (eval_arguments(world, "--split", "val", "--rank_file", str(world / "data/influence_test.npz")), "20 queries"),
    ):
        capsys.readouterr()
        assert evaluation.main(arguments) == 2
        assert expected in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        evaluation.main(eval_arguments(world, "--device", "nowhere"))
    assert stopped.value.code == 2
