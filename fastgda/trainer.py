"""Trains the ranker on the teacher's rankings (paper, section 3.3), on arrays: no Python call per pair.

Each step embeds its distinct queries and images once and scores the labelled pairs among them. What is kept is the
ranker with the best validation mAP(L), averaged over L; test queries are never seen here. Sampling is keyed by
(seed, step) and dropout is seeded likewise, so a run that was killed continues bit for bit.
"""

from __future__ import annotations

import hashlib
import math
import pickle
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastgda.core import atomic_path, keyed_generator, save_json
from fastgda.dataset import Split
from fastgda.losses import make_loss
from fastgda.metrics import check_levels, embedding_retrieval, standard_error
from fastgda.ranker import Ranker, RankerConfig
from fastgda.sampling import BlockSampler, PairSampler, Step, relevance_table
from fastgda.tracking import Tracker

SHOW_EVERY = 20
"""Steps between looks at the loss, each of which waits for the device."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything a training run depends on besides its data. The defaults are the paper's recipe."""

    hidden_sizes: tuple[int, ...] = (768, 768, 768)
    """sizes of the hidden layers; none for a linear map"""
    input_norm: Literal["none", "layer", "batch"] = field(default="none", metadata={"const": "layer"})
    """normalisation of the input feature; the bare flag means layer normalisation"""
    dropout: float = 0.1
    """dropout probability after each hidden layer"""
    out_feat_dim: int = 768
    """dimension of the embedding"""
    residual: bool = False
    """add a linear map of the feature, orthogonal at first, to the output of the MLP"""
    init_scale: float = -5.0
    """learned scale at first; the bias starts at minus half of it"""
    loss: Literal["bce", "listwise"] = "bce"
    """bce on normalised ranks (eq. 3), or softmax cross-entropy on the top of the ranking"""
    target: Literal["rank", "score"] = "rank"
    """listwise only: teacher's relevance from ranks (normal quantiles) or from standardised scores"""
    temperature: float = 0.5
    """listwise only: temperature of the target; mass lies around 1/temperature deviations above the mean"""
    sampling: Literal["pairs", "blocks"] = "pairs"
    """i.i.d. pairs as in the paper, or blocks of queries x images that use every labelled pair among them"""
    outlier_prob: float = 0.1
    """share of pairs with an image outside the candidates"""
    batch_size: int = 4096
    """pairs per step with --sampling pairs"""
    query_block: int = 64
    """queries per step with --sampling blocks"""
    image_block: int = 1024
    """images drawn per step with --sampling blocks"""
    epochs: int = 10
    """epochs: with pairs, as many draws as the rankings hold pairs; with blocks, one visit to every query"""
    lr: float = 1e-3
    """learning rate of AdamW"""
    weight_decay: float = 0.01
    """weight decay of AdamW"""
    schedule: Literal["constant", "cosine"] = "constant"
    """learning rate over the run; cosine ends at zero"""
    val_every: int = 1
    """epochs between validations"""
    patience: int = 0
    """stop after this many validations without a better mAP(L); 0 never stops early"""
    seed: int = 0
    """seed of initial weights, sampling and dropout"""
    bf16: bool = False
    """compute the MLP in bfloat16; weights, similarities and updates stay float32"""
    compile: bool = False
    """compile the MLP with torch.compile"""

    def __post_init__(self) -> None:
        positive = ("batch_size", "query_block", "image_block", "epochs", "val_every", "temperature", "lr")
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name}: expected a positive number, found {getattr(self, name)}")
        for name in ("weight_decay", "patience", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name}: expected zero or more, found {getattr(self, name)}")
        if not 0 <= self.outlier_prob < 1:
            raise ValueError(f"--outlier_prob: expected a probability below 1, found {self.outlier_prob}")
        if self.loss == "listwise" and self.sampling == "pairs":
            raise ValueError(
                "--loss listwise: expected --sampling blocks (it compares images of one query), found pairs"
            )

    def architecture(self, in_dim: int) -> RankerConfig:
        """The ranker's configuration for `in_dim`-dimensional features."""
        sizes = tuple(self.hidden_sizes), self.out_feat_dim
        return RankerConfig(in_dim, *sizes, self.input_norm, self.dropout, self.residual)


RECIPES = {
    "paper": TrainConfig(),
    "best": TrainConfig(
        input_norm="layer",
        residual=True,
        init_scale=-20.0,
        loss="listwise",
        temperature=1.0,
        sampling="blocks",
        outlier_prob=0.5,
        epochs=60,
        schedule="cosine",
        val_every=5,
    ),
}
"""Named defaults of train.py; every flag overrides them."""


class Trainer:
    """One training run: `Trainer(...).run()` returns the best ranker."""

    def __init__(
        self,
        config: TrainConfig,
        images: np.ndarray,
        train: Split,
        validation: Split,
        *,
        levels: tuple[int, ...],
        run_dir: Path,
        device: torch.device,
        tracker: Tracker | None = None,
    ) -> None:
        """images [N, D]: features of the training images. levels: the L of validation mAP(L).

        `run_dir/checkpoint.pt` is taken up where it exists; `ValueError` if it belongs to another run.
        """
        check_levels(levels, validation.rankings.candidates, len(images))
        self.config, self.validation, self.levels = config, validation, levels
        self.run_dir, self.device, self.tracker = run_dir, device, tracker
        self.identity = {
            "config": _plain(asdict(config)),
            "levels": list(levels),
            "data": _digest(images, train, validation),
        }
        self.sampler = make_sampler(config, train, len(images))
        self.loss = make_loss(config.loss, config.temperature)
        self.images = torch.from_numpy(images).to(device)
        self.queries = torch.from_numpy(train.features).to(device)
        # the global generator initialises modules, so it is seeded here and put back afterwards
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_seed("init", config.seed))
            self.ranker = Ranker(config.architecture(images.shape[1]), config.init_scale).to(device)
        self.embed = torch.compile(self.ranker, dynamic=True) if config.compile else self.ranker
        self.optimizer = torch.optim.AdamW(self.ranker.parameters(), config.lr, weight_decay=config.weight_decay)
        self.step, self.loss_sum = 0, torch.zeros((), dtype=torch.float64, device=device)
        self.history: list[dict[str, Any]] = []
        self.best_state: dict[str, Tensor] = {}
        self.total_steps = config.epochs * self.sampler.steps_per_epoch
        if self.checkpoint_file.is_file():
            self._resume()

    @property
    def checkpoint_file(self) -> Path:
        """Where the state of the run is kept."""
        return self.run_dir / "checkpoint.pt"

    @property
    def best(self) -> float:
        """Best mean validation mAP(L) so far."""
        return max((entry["score"] for entry in self.history if "score" in entry), default=-math.inf)

    def run(self, *, checkpoint_seconds: float = 20.0, stop_after_steps: int | None = None) -> Ranker:
        """Trains to the end (or for `stop_after_steps` further steps) and returns the best ranker.

        A killed run goes on from its last checkpoint; none is written on the way out of an exception, which may have
        come in the middle of an update.
        """
        stop = self.total_steps if stop_after_steps is None else min(self.total_steps, self.step + stop_after_steps)
        if not self.history:
            self._validate(epoch=0, loss=None)
        saved_at = time.monotonic()
        bar = tqdm(total=self.total_steps, initial=self.step, desc="train", unit="step", mininterval=1.0)
        self.ranker.train()
        try:
            for drawn in self._steps(stop):
                if self._stopped():
                    break
                self._update(drawn)
                bar.update()
                if self.step % SHOW_EVERY == 0:
                    self._show(bar, drawn)
                if self.step % self.sampler.steps_per_epoch == 0:
                    self._end_epoch()
                if time.monotonic() - saved_at > checkpoint_seconds:
                    self._save()
                    saved_at = time.monotonic()
        finally:
            bar.close()
        self._save()
        self.ranker.load_state_dict(self.best_state)
        return self.ranker.eval()

    def _steps(self, stop: int) -> Iterator[Step]:
        # the next step is drawn while this one is computed
        with ThreadPoolExecutor(1) as pool:
            following = pool.submit(self.sampler.step, self.step)
            for number in range(self.step, stop):
                drawn, following = following.result(), pool.submit(self.sampler.step, number + 1)
                yield drawn

    def _update(self, drawn: Step) -> None:
        config, count = self.config, len(drawn.queries)
        if config.schedule == "cosine":
            for group in self.optimizer.param_groups:
                group["lr"] = config.lr * 0.5 * (1 + math.cos(math.pi * self.step / self.total_steps))
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(_seed("dropout", config.seed, self.step))
            rows = torch.cat([self.queries[self._move(drawn.queries)], self.images[self._move(drawn.images)]])
            with torch.autocast(self.device.type, torch.bfloat16, enabled=config.bf16):
                embedded = self.embed(rows)
        query, image = embedded[:count], embedded[count:]
        if drawn.pairs is None:
            similarity = query @ image.T
        else:
            left, right = (self._move(places) for places in drawn.pairs)
            similarity = (query[left] * image[right]).sum(dim=-1)
        arrays = (self._move(array) for array in (drawn.label, drawn.relevance, drawn.weight))
        value = self.loss(self.ranker.logits(similarity), *arrays)
        value.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss_sum += value.detach()
        self.step += 1

    def _move(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    def _show(self, bar: tqdm, drawn: Step) -> None:
        done = (self.step - 1) % self.sampler.steps_per_epoch + 1
        bar.set_postfix(loss=f"{self.loss_sum.item() / done:.4f}", pairs=drawn.label.size, mAP=f"{self.best:.3f}")

    def _end_epoch(self) -> None:
        steps, epoch = self.sampler.steps_per_epoch, self.step // self.sampler.steps_per_epoch
        loss = self.loss_sum.item() / steps
        if not math.isfinite(loss):
            raise ValueError(f"{self.run_dir}: the loss became {loss} in epoch {epoch}; lower --lr")
        self.loss_sum.zero_()
        if epoch % self.config.val_every == 0 or self.step == self.total_steps:
            self._validate(epoch, loss)
        else:
            self.history.append(self._entry(epoch, loss))
        save_json(self.run_dir / "log.json", {**self.identity, "history": self.history})
        if self.tracker is not None:
            entry = self.history[-1]
            curves = {f"validation/mAP({level})": value for level, value in entry.get("mAP", {}).items()}
            self.tracker.log(self.step, {"train/loss": loss, "scale": entry["scale"], **curves})

    def _entry(self, epoch: int, loss: float | None) -> dict[str, Any]:
        scale, bias = self.ranker.scale.item(), self.ranker.bias.item()
        return {"epoch": epoch, "step": self.step, "loss": loss, "scale": scale, "bias": bias}

    def _validate(self, epoch: int, loss: float | None) -> None:
        queries, images = self.ranker.embed_queries(self.validation.features), self.ranker.embed(self.images)
        found = embedding_retrieval(queries, images, self.validation.rankings, self.levels, precision_only=True)
        means, errors = found.precision.mean(axis=0), standard_error(found.precision)
        score, better = float(means.mean()), float(means.mean()) > self.best
        keys = [str(level) for level in self.levels]
        self.history.append(
            {
                **self._entry(epoch, loss),
                "mAP": dict(zip(keys, means.tolist(), strict=True)),
                "standard_error": {
                    key: value if math.isfinite(value) else None
                    for key, value in zip(keys, errors.tolist(), strict=True)
                },
                "score": score,
            }
        )
        if better:
            self.best_state = {name: value.detach().clone() for name, value in self.ranker.state_dict().items()}

    def _stopped(self) -> bool:
        scores = [entry["score"] for entry in self.history if "score" in entry]
        return 0 < self.config.patience <= len(scores) - 1 - int(np.argmax(scores))

    def _save(self) -> None:
        state = {
            "identity": self.identity,
            "step": self.step,
            "loss_sum": self.loss_sum,
            "ranker": self.ranker.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
            "best_state": self.best_state,
        }
        with atomic_path(self.checkpoint_file) as temporary:
            torch.save(state, temporary)

    def _resume(self) -> None:
        path = self.checkpoint_file
        try:
            saved = torch.load(path, map_location=self.device, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
            raise ValueError(f"{path}: expected a checkpoint, found a damaged file; delete it ({error})") from error
        for part, wanted in self.identity.items():
            if saved["identity"][part] != wanted:
                found = saved["identity"][part]
                raise ValueError(f"{path}: expected {part} of this run, found {_difference(wanted, found)}; delete it")
        self.step, self.history, self.best_state = saved["step"], saved["history"], saved["best_state"]
        self.loss_sum.copy_(saved["loss_sum"])
        self.ranker.load_state_dict(saved["ranker"])
        self.optimizer.load_state_dict(saved["optimizer"])


def make_sampler(config: TrainConfig, train: Split, images: int) -> PairSampler | BlockSampler:
    """The sampler that `config.sampling` names."""
    relevance = relevance_table(train.rankings, config.target)
    data = train.rankings, images, relevance
    if config.sampling == "pairs":
        return PairSampler(*data, batch_size=config.batch_size, outlier_prob=config.outlier_prob, seed=config.seed)
    return BlockSampler(
        *data,
        query_block=config.query_block,
        image_block=config.image_block,
        outlier_prob=config.outlier_prob,
        seed=config.seed,
    )


def _seed(*key: int | str) -> int:
    return keyed_generator(*key).initial_seed()


def _digest(images: np.ndarray, *splits: Split) -> str:
    digest = hashlib.sha256()
    for array in (images, *(array for split in splits for array in (split.features, split.rankings.rank))):
        digest.update(str(array.shape).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}


def _difference(wanted: Any, found: Any) -> str:
    if not isinstance(wanted, dict):
        return f"{found!r}, wanted {wanted!r}"
    name = next(key for key in wanted if found.get(key) != wanted[key])
    return f"{name} {found.get(name)!r}, wanted {wanted[name]!r}"
