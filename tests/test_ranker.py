"""Ranker: released key names, architecture inferred from shapes, one sign for every scale, damaged checkpoints."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastgda.ranker import Ranker, RankerConfig, load_ranker, save_ranker

CONFIG = RankerConfig(in_dim=10, hidden_sizes=(8, 7, 6), out_feat_dim=5)
RELEASED = {f"mlp.layers.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")} | {
    "mlp.output_layer.weight",
    "mlp.output_layer.bias",
    "scale",
    "bias",
}


def slow_forward(state: dict, features: np.ndarray) -> np.ndarray:
    """Embeddings of a released state dict without input norm, in float64."""
    hidden = features.astype(np.float64)
    for layer in range(3):
        weight, bias = (state[f"mlp.layers.{layer}.{kind}"].double().numpy() for kind in ("weight", "bias"))
        hidden = np.maximum(hidden @ weight.T + bias, 0)
    out = hidden @ state["mlp.output_layer.weight"].double().numpy().T + state["mlp.output_layer.bias"].double().numpy()
    return out / np.linalg.norm(out, axis=1, keepdims=True)


def test_released_state_dict_loads_and_is_written_the_same_way(tmp_path, rng):
    random = torch.Generator().manual_seed(0)
    shapes = {name: value.shape for name, value in Ranker(CONFIG).state_dict().items()}
    assert set(shapes) == RELEASED and shapes["scale"] == shapes["bias"] == (1,)
    state = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    torch.save(state, tmp_path / "released.pth")
    ranker = load_ranker(tmp_path / "released.pth", in_dim=10)
    assert ranker.config == CONFIG and not ranker.training
    features = rng.standard_normal((20, 10)).astype(np.float32)
    np.testing.assert_allclose(ranker.embed(features).numpy(), slow_forward(state, features), atol=1e-5)
    save_ranker(tmp_path / "ours.pth", ranker, ftype="effnet")
    ours = torch.load(tmp_path / "ours.pth", weights_only=True)
    assert ours.keys() == state.keys() and all(torch.equal(ours[name], state[name]) for name in state)


@pytest.mark.parametrize(
    "config",
    [
        replace(CONFIG, input_norm="layer", dropout=0.3),
        replace(CONFIG, input_norm="batch"),
        replace(CONFIG, hidden_sizes=(), residual=True),
        replace(CONFIG, hidden_sizes=(4,), residual=True, input_norm="layer"),
    ],
)
def test_architecture_travels_with_the_checkpoint(tmp_path, rng, config):
    ranker = Ranker(config).eval()
    save_ranker(tmp_path / "r.pth", ranker, ftype="pixel", note=3)
    read = load_ranker(tmp_path / "r.pth")
    assert asdict(read.config) == asdict(config)
    assert read.info == {"ftype": "pixel", "note": 3}
    features = rng.standard_normal((4, 10)).astype(np.float32)
    assert torch.equal(read.embed(features), ranker.embed(features))


def test_half_precision_keeps_the_embedding(tmp_path, rng):
    ranker = Ranker(RankerConfig(12, (16,), 8)).eval()
    save_ranker(tmp_path / "half.pth", ranker, torch.float16)
    stored = torch.load(tmp_path / "half.pth", weights_only=True)
    assert {value.dtype for value in stored.values()} == {torch.float16}
    features = rng.normal(size=(5, 12)).astype(np.float32)
    loaded = load_ranker(tmp_path / "half.pth")
    assert loaded.scale.dtype == torch.float32
    np.testing.assert_allclose(loaded.embed(features), ranker.embed(features), atol=2e-3)


@pytest.mark.parametrize("scale", [-7.0, 7.0])
def test_higher_dot_product_is_more_influential_for_either_sign(rng, scale):
    torch.manual_seed(0)
    ranker = Ranker(CONFIG, init_scale=scale)
    images, queries = (rng.standard_normal((count, 10)).astype(np.float32) for count in (30, 4))
    cosine = ranker.embed(queries) @ ranker.embed(images).T
    modelled_rank = torch.sigmoid(ranker.logits(cosine)).detach()
    influence = ranker.embed_queries(queries) @ ranker.embed(images).T
    # cosines a rounding apart may be one rank, so that equal permutations would be too much to ask
    rising = modelled_rank.gather(1, influence.argsort(dim=1, descending=True)).diff(dim=1)
    assert rising.min() > -1e-6 and rising.sum(1).min() > 1e-4
    torch.testing.assert_close(ranker.embed(images).norm(dim=1), torch.ones(30))


def test_several_heads_rank_by_one_inner_product(tmp_path, rng):
    """The concatenated embedding ranks as the sum of the heads' logits does, and the checkpoint tells the heads."""
    ranker = Ranker(replace(CONFIG, heads=3, residual=True)).eval()
    with torch.no_grad():
        ranker.scale.copy_(torch.tensor([-4.0, 1.5, -0.5]))
        ranker.bias.copy_(torch.tensor([1.0, -2.0, 0.3]))
    save_ranker(tmp_path / "r.pth", ranker)
    read = load_ranker(tmp_path / "r.pth")
    assert read.config == ranker.config and read.config.embedding_dim == 15
    images, queries = (rng.standard_normal((count, 10)).astype(np.float32) for count in (40, 5))
    logits = torch.zeros(5, 40)
    parts = [ranker.mlp(torch.from_numpy(rows)).detach().reshape(-1, 3, 5) for rows in (queries, images)]
    for head in range(3):
        left, right = (torch.nn.functional.normalize(part[:, head], dim=1) for part in parts)
        logits += ranker.scale[head].detach() * (left @ right.T) + ranker.bias[head].detach()
    influence = read.embed_queries(queries) @ read.embed(images).T
    torch.testing.assert_close(read.embed(images).norm(dim=1), torch.ones(40))
    assert influence.abs().max() <= 1
    assert np.corrcoef(influence.ravel(), -logits.ravel())[0, 1] == pytest.approx(1, abs=1e-6)
    embedded_queries, embedded_images = (ranker(torch.from_numpy(rows)) for rows in (queries, images))
    similarity = ranker.similarity(embedded_queries, embedded_images)
    torch.testing.assert_close(ranker.logits(similarity).sum(dim=0), logits)
    places = torch.tensor([4, 0]), torch.tensor([7, 39])
    some = ranker.similarity(embedded_queries, embedded_images, places)
    torch.testing.assert_close(some, similarity[:, places[0], places[1]])


def test_initial_similar_pairs_have_a_small_rank():
    ranker = Ranker(CONFIG)
    similar, neutral = torch.sigmoid(ranker.logits(torch.tensor([1.0, 0.0])))
    assert similar < 0.1 and neutral > 0.9


def test_residual_keeps_the_geometry_of_the_feature(rng):
    features = rng.standard_normal((40, 10)).astype(np.float32)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    embedded = Ranker(RankerConfig(in_dim=10, hidden_sizes=(32,), out_feat_dim=16, residual=True)).embed(features)
    assert np.corrcoef((unit @ unit.T).ravel(), (embedded @ embedded.T).numpy().ravel())[0, 1] > 0.98


def test_embedding_does_not_depend_on_the_batch(rng, monkeypatch):
    ranker = Ranker(replace(CONFIG, input_norm="batch")).train()
    features = rng.standard_normal((23, 10)).astype(np.float32)
    whole = ranker.embed(features)
    monkeypatch.setattr("fastgda.ranker.ROWS", 5)
    torch.testing.assert_close(ranker.embed(features), whole)
    assert ranker.training


class Payload:
    def __reduce__(self):
        return print, ("hostile",)


def test_damaged_checkpoints(tmp_path, capsys):
    path = tmp_path / "r.pth"
    with pytest.raises(ValueError, match="found nothing"):
        load_ranker(path)
    save_ranker(path, Ranker(CONFIG))
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"not a checkpoint", pickle.dumps(Payload())):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{path}: expected"):
            load_ranker(path)
    assert "hostile" not in capsys.readouterr().out
    state = Ranker(CONFIG).state_dict()
    for change, message in (
        ({"scale": None}, "no scale"),
        ({"mlp.layers.1.bias": None}, "mlp.layers.1.bias"),
        ({"mlp.layers.1.weight": torch.zeros(9, 9)}, "mlp.layers.1"),
        ({"head.weight": torch.zeros(1)}, "head.weight"),
        ({"mlp.output_layer.bias": torch.full((5,), torch.nan)}, "NaN or infinity in mlp.output_layer.bias"),
        ({"mlp.layers.0.weight": torch.zeros(3)}, "no matrices"),
        ({"scale": torch.zeros(2), "bias": torch.zeros(2)}, "5 outputs, which 2 heads do not share equally"),
    ):
        changed = {name: value for name, value in {**state, **change}.items() if value is not None}
        torch.save(changed, path)
        with pytest.raises(ValueError, match=message):
            load_ranker(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="another structure"):
        load_ranker(path)


def test_wrong_feature_dimension(tmp_path):
    save_ranker(tmp_path / "r.pth", Ranker(CONFIG))
    with pytest.raises(ValueError, match="ranker of 12-dimensional features, found one of 10"):
        load_ranker(tmp_path / "r.pth", in_dim=12)


@pytest.mark.parametrize("change", [{"dropout": 1.0}, {"hidden_sizes": (0,)}, {"input_norm": "group"}, {"heads": 0}])
def test_impossible_architectures(change):
    with pytest.raises(ValueError, match="expected"):
        replace(CONFIG, **change)


def test_hub_folder_holds_the_checkpoint(tmp_path, rng):
    ranker = Ranker(replace(CONFIG, heads=2, input_norm="layer"))
    ranker.info = {"ftype": "effnet"}
    ranker.save_pretrained(tmp_path / "hub")
    read = Ranker.from_pretrained(tmp_path / "hub")
    assert read.config == ranker.config and read.info == {"ftype": "effnet"} and not read.training
    features = rng.standard_normal((6, 10)).astype(np.float32)
    assert torch.equal(read.embed_queries(features), ranker.embed_queries(features))
    assert json.loads((tmp_path / "hub/config.json").read_text())["hidden_sizes"] == [8, 7, 6]
    assert "data-attribution" in (tmp_path / "hub/README.md").read_text()


def test_push_to_hub_uploads_that_folder(tmp_path, monkeypatch):
    """The hub's client is replaced by a folder: no test reaches the hub."""

    class FolderHub:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **_):
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, repo_id, folder_path, **_):
            return str(shutil.copytree(folder_path, tmp_path / repo_id))

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", FolderHub)
    ranker = Ranker(CONFIG)
    url = ranker.push_to_hub("someone/ranker")
    state = Ranker.from_pretrained(url).state_dict()
    assert all(torch.equal(state[name], value) for name, value in ranker.state_dict().items())


def test_hub_folder_without_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=r"ranker\.pth: expected a file, found nothing"):
        Ranker.from_pretrained(tmp_path)
