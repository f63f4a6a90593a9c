"""The sweep on the planted problem: every study's settings, resumption run by run, files and figures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from planted import LEVELS, write_planted

from benchmark import sweep
from benchmark.studies import FIGURES, STUDIES, Problem
from fastgda.metrics import average_precision
from fastgda.recipes import RECIPES

QUICK = [
    *["--hidden_sizes", "--out_feat_dim", "18", "--no-residual", "--input_norm", "none", "--dropout", "0"],
    *["--init_scale", "-8", "--lr", "0.01", "--query_block", "150", "--image_block", "150", "--epochs", "2"],
]


def arguments(folder, *more: str) -> list[str]:
    places = ["--data_dir", str(folder / "data"), "--output", str(folder / "out"), "--run_dir", str(folder / "runs")]
    levels = ["--topk_values", *map(str, LEVELS)]
    return ["--ftype", "planted", "--ftypes", "planted", "--device", "cpu", *places, *levels, *QUICK, *more]


def test_settings_hold_what_they_do_not_vary():
    problem = Problem(RECIPES["best"], queries=1200, candidates=2048, ftypes=("a", "b"))
    sizes = {}
    for name, settings in STUDIES.items():
        found = settings(problem)
        sizes[name] = len(found)
        assert len({(setting.x, setting.series) for setting in found}) == len(found)
        if name in ("queries", "budget"):
            visits = [(setting.queries or 0) * setting.changes["epochs"] for setting in found]
            np.testing.assert_allclose(visits, 1200 * problem.base.epochs, rtol=0.01)
    assert sizes == {"features": 2, "losses": 5, "outliers": 5, "queries": 5, "subset": 10, "budget": 5}
    entries = [(s.queries or 0) * s.changes["random_subset_size"] for s in STUDIES["budget"](problem)]
    assert entries == [1200 * 2048 // 16] * 5


def test_sweep_is_resumed_run_by_run(tmp_path, capsys, monkeypatch):
    write_planted(tmp_path / "data")
    command = arguments(tmp_path, "--studies", "features", "losses", "outliers", "--seeds", "1")
    assert sweep.main([*command, "--dry_run"]) == 0
    listed = capsys.readouterr().out
    assert (listed.count("to do, about"), listed.count("as before")) == (9, 2) and "total: about" in listed
    assert not (tmp_path / "out").exists() and not (tmp_path / "runs").exists()

    trained: list[Path] = []
    build = sweep.Trainer

    def counted(*args, **options):
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(options["run_dir"])
        return build(*args, **options)

    monkeypatch.setattr(sweep, "Trainer", counted)
    assert sweep.main(command) == 130
    assert {path.parent for path in (tmp_path / "runs").glob("*/result.json")} == set(trained)
    monkeypatch.setattr(sweep, "Trainer", build)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/result.json")}
    assert sweep.main(command) == 0
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())

    losses = json.loads((tmp_path / "out/losses.json").read_text())
    assert [run["x"] for run in losses["runs"]] == ["bce", "mse", "ordinal", "score", "listwise"]
    assert [run["config"]["out_feat_dim"] for run in losses["runs"]] == [18, 18, 2, 18, 18]
    (feature,) = json.loads((tmp_path / "out/features.json").read_text())["runs"]
    outliers = json.loads((tmp_path / "out/outliers.json").read_text())["runs"]
    assert feature["mAP"] == losses["runs"][4]["mAP"] == next(run for run in outliers if run["x"] == 0.5)["mAP"]
    assert len(list((tmp_path / "runs").iterdir())) == 9  # the base is a run of three studies
    assert losses["changed_from_the_best_recipe"]["hidden_sizes"] == [] and losses["seeds"] == 1
    assert all(run["seconds"] > 0 for run in losses["runs"])
    figures = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert figures == {"figure3_features_losses.png"}


def test_figures_are_the_papers():
    assert list(FIGURES.values()) == [("features", "losses"), ("queries", "outliers"), ("subset", "budget")]
    assert [name[:7] for name in FIGURES] == ["figure3", "figure4", "figure5"]


def test_an_interrupted_sweep_leaves_the_fuller_document(tmp_path, monkeypatch):
    write_planted(tmp_path / "data")
    whole = STUDIES["queries"]
    monkeypatch.setitem(STUDIES, "queries", lambda problem: whole(problem)[-2:])
    command = arguments(tmp_path, "--studies", "queries", "--seeds", "1")
    assert sweep.main(command) == 0
    document = tmp_path / "out/queries.json"
    before = document.read_bytes()
    train = sweep.result_of

    def interrupted(run, *rest):
        if run.config.seed == 1:
            raise KeyboardInterrupt
        return train(run, *rest)

    monkeypatch.setattr(sweep, "result_of", interrupted)
    assert sweep.main([*command[:-1], "2"]) == 130
    assert document.read_bytes() == before


def test_fewer_seeds_do_not_replace_more(tmp_path, capsys):
    write_planted(tmp_path / "data")
    document = tmp_path / "out/queries.json"
    document.parent.mkdir()
    document.write_text('{"seeds": 3}')
    assert sweep.main(arguments(tmp_path, "--studies", "queries", "--seeds", "2")) == 2
    assert f"{document}: expected --seeds of at least its 3" in capsys.readouterr().err
    assert document.read_text() == '{"seeds": 3}'


@pytest.mark.parametrize("flag", ["--redu", "--epoch"])
def test_flags_are_not_abbreviated(tmp_path, flag, capsys):
    with pytest.raises(SystemExit) as stopped:
        sweep.main(arguments(tmp_path, flag))
    assert stopped.value.code == 2 and f"unrecognized arguments: {flag}" in capsys.readouterr().err


def test_untuned_is_the_cosine_of_the_features(tmp_path):
    images, splits = write_planted(tmp_path / "data")
    data = sweep.Data(sweep.layout("emoji", "planted", tmp_path / "data"), LEVELS)
    test = splits["test"]
    cosine = [
        [q @ z / np.linalg.norm(q) / np.linalg.norm(z) for z in images.astype(float)]
        for q in test.features[:3].astype(float)
    ]
    expected = average_precision(np.array(cosine), test.rankings.rank[:3], LEVELS)
    np.testing.assert_allclose(data.untuned.precision[:3], expected, rtol=1e-3)


def test_reduced_is_a_base_that_flags_still_change():
    args = sweep.parser(sweep.REDUCED).parse_args(["--epochs", "3"])
    assert (args.epochs, args.image_block, args.hidden_sizes, args.loss) == (3, 512, (384,), "listwise")


def test_unknown_data_is_one_clear_line(tmp_path, capsys):
    assert sweep.main(arguments(tmp_path)) == 2
    assert "data_feats.npy: expected a file, found nothing" in capsys.readouterr().err


@pytest.mark.parametrize("study", ["queries", "subset", "budget"])
def test_other_studies_run_on_one_setting(tmp_path, study, monkeypatch):
    write_planted(tmp_path / "data")
    whole = STUDIES[study]
    monkeypatch.setitem(STUDIES, study, lambda problem: whole(problem)[1:2])
    assert sweep.main(arguments(tmp_path, "--studies", study, "--seeds", "2")) == 0
    runs = json.loads((tmp_path / f"out/{study}.json").read_text())["runs"]
    assert [run["seed"] for run in runs] == [0, 1] and len({run["mAP"][str(LEVELS[0])] for run in runs}) == 2
