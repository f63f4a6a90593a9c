"""Trains the ranker on the teacher's rankings (paper, section 3.3), on arrays: no Python call per pair.

Each step embeds its distinct queries and images once and scores the labelled pairs among them. What is kept is the
ranker with the best validation mAP(L), averaged over L; test queries are never seen here. Sampling is keyed by
(seed, step) and dropout is seeded likewise, so a run that was killed continues bit for bit, and several processes share
a run (`fastgda.distributed`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from fastgda import runs
from fastgda.core import keyed_generator, save_json
from fastgda.dataset import Split, unreadable
from fastgda.distributed import Group
from fastgda.losses import make_loss
from fastgda.metrics import check_levels, embedding_retrieval, standard_error
from fastgda.ranker import Ranker
from fastgda.rankings import top
from fastgda.recipes import TrainConfig
from fastgda.sampling import Step, make_sampler
from fastgda.tracking import Tracker

RETRIEVED = (8, 10)
"""Validation queries in the tracker's table of retrievals, and images for each."""
SHOW_EVERY = 20
"""Steps between looks at the loss, each of which waits for the device."""


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
        group: Group | None = None,
    ) -> None:
        """images [N, D]: features of the training images, possibly mapped from their file. levels: the L of mAP(L).

        `run_dir/checkpoint.pt` is taken up where it exists; `ValueError` if it belongs to another run. `group`: the
        processes that share the run; the first one writes its files.
        """
        check_levels(levels, validation.rankings.candidates, len(images))
        self.config, self.validation, self.levels = config, validation, levels
        self.run_dir, self.device, self.tracker, self.group = run_dir, device, tracker, group or Group()
        if self.group.size > 1 and config.input_norm == "batch":
            raise ValueError(f"--input_norm batch: expected one process, found {self.group.size}; use layer")
        if self.group.size > 1 and config.compile:
            raise ValueError(f"--compile: expected one process, found {self.group.size}; leave it out")
        self.identity = runs.identity(config, levels, images, train, validation)
        self.sampler = make_sampler(config, train.rankings, len(images))
        self.loss = make_loss(config.loss, config.temperature)
        self.images, self.missing = torch.from_numpy(images).to(device), unreadable(images)
        self.queries = torch.from_numpy(train.features).to(device)
        # the global generator initialises modules, so it is seeded here and put back afterwards
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_seed("init", config.seed))
            self.ranker = Ranker(config.architecture(images.shape[1]), config.init_scale).to(device)
        self.embed = torch.compile(self.ranker, dynamic=True) if config.compile else self.ranker
        self.optimizer = torch.optim.AdamW(self.ranker.parameters(), config.lr, weight_decay=config.weight_decay)
        self.averaged: AveragedModel | None = None
        if config.ema:
            self.averaged = AveragedModel(self.ranker, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
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

    @property
    def best_epoch(self) -> int:
        """Epoch of the ranker with the best validation so far; 0 is before training."""
        validated = [entry for entry in self.history if "score" in entry]
        return max(validated, key=lambda entry: entry["score"])["epoch"]

    @property
    def kept(self) -> Ranker:
        """What is validated and kept: the average of the weights where there is one."""
        ranker = self.ranker if self.averaged is None else self.averaged.module
        assert isinstance(ranker, Ranker)
        return ranker

    def run(self, *, checkpoint_seconds: float = 20.0, stop_after_steps: int | None = None) -> Ranker:
        """Trains to the end (or for `stop_after_steps` further steps) and returns the best ranker.

        A killed run goes on from its last checkpoint; none is written on the way out of an exception, which may have
        come in the middle of an update.
        """
        stop = self.total_steps if stop_after_steps is None else min(self.total_steps, self.step + stop_after_steps)
        if not self.history:
            self._validate(epoch=0, loss=None)
        if self._stopped():
            stop = self.step
        saved_at, silent = time.monotonic(), not self.group.first
        bar = tqdm(
            total=self.total_steps, initial=self.step, desc="train", unit="step", mininterval=1.0, disable=silent
        )
        try:
            for drawn in self.steps(stop):
                bar.update()
                if self.step % SHOW_EVERY == 0:
                    self._show(bar, drawn)
                if self.step % self.sampler.steps_per_epoch == 0:
                    self._end_epoch()
                if time.monotonic() - saved_at > checkpoint_seconds:
                    self._save()
                    saved_at = time.monotonic()
                if self._stopped():
                    break
        finally:
            bar.close()
        self._save()
        self.ranker.load_state_dict(self.best_state)
        return self.ranker.eval()

    def steps(self, stop: int) -> Iterator[Step]:
        """Trains up to step `stop` and nothing else: yields each step after its update."""
        # the next step is drawn while this one is computed
        with ThreadPoolExecutor(1) as pool:
            following = pool.submit(self.sampler.step, self.step)
            for number in range(self.step, stop):
                drawn, following = following.result(), pool.submit(self.sampler.step, number + 1)
                self.ranker.train()
                self._update(drawn)
                yield drawn

    def _update(self, drawn: Step) -> None:
        config, count = self.config, len(drawn.queries)
        if config.schedule == "cosine":
            for group in self.optimizer.param_groups:
                group["lr"] = config.lr * 0.5 * (1 + math.cos(math.pi * self.step / self.total_steps))
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(_seed("dropout", config.seed, self.step))
            rows = torch.cat([self.queries[self._move(drawn.queries)], self.images[self._move(drawn.images)]])
            share = self.group.share(len(rows))
            self.ranker.mlp.dropout.batch = (share.start, len(rows)) if self.group.size > 1 else None
            with torch.autocast(self.device.type, torch.bfloat16, enabled=config.bf16):
                embedded = self.embed(rows[share])
        embedded = self.group.gather(embedded, len(rows))
        pairs = None if drawn.pairs is None else (self._move(drawn.pairs[0]), self._move(drawn.pairs[1]))
        similarity = self.ranker.similarity(embedded[:count], embedded[count:], pairs)
        arrays = (self._move(array) for array in (drawn.label, drawn.relevance, drawn.weight))
        value = self.loss(self.ranker.logits(similarity), *arrays)
        value.backward()
        self.group.add_gradients(self.ranker.mlp.parameters(), [self.ranker.scale, self.ranker.bias])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.averaged is not None:
            self.averaged.update_parameters(self.ranker)
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
        if self.group.first:
            save_json(self.run_dir / "log.json", {**self.identity, "history": self.history})
        if self.tracker is not None:
            entry = self.history[-1]
            curves = {f"validation/mAP({level})": value for level, value in entry.get("mAP", {}).items()}
            self.tracker.log(self.step, {"train/loss": loss, "scale": entry["scale"], **curves})

    def _entry(self, epoch: int, loss: float | None) -> dict[str, Any]:
        scale, bias = self.ranker.scale.mean().item(), self.ranker.bias.mean().item()
        return {"epoch": epoch, "step": self.step, "loss": loss, "scale": scale, "bias": bias}

    def _validate(self, epoch: int, loss: float | None) -> None:
        ranker = self.kept
        part = ranker.embed(self.images[self.group.share(len(self.images))])
        queries, images = ranker.embed_queries(self.validation.features), self.group.gather(part, len(self.images))
        judged = self.validation.rankings, self.levels
        found = embedding_retrieval(queries, images, *judged, precision_only=True, missing=self.missing)
        precision = self.group.from_first(torch.from_numpy(found.precision).to(self.device)).cpu().numpy()
        means, errors = precision.mean(axis=0), standard_error(precision)
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
        if self.tracker is not None:
            self.tracker.log_table(self.step, "validation/retrievals", *self._retrievals(queries, images))
        if better:
            self.best_state = {name: value.detach().clone() for name, value in ranker.state_dict().items()}

    def _retrievals(self, queries: Tensor, images: Tensor) -> tuple[list[str], list[list[float]]]:
        # (columns, rows): what the first validation queries retrieve, and where the teacher ranks it
        asked, shown = RETRIEVED
        scores = (queries[:asked] @ images.T).float().cpu().numpy()
        rows = []
        for query, found in enumerate(top(scores, min(shown, scores.shape[1]))):
            place = {int(image): rank for rank, image in enumerate(self.validation.rankings.rank[query], 1)}
            for position, image in enumerate(map(int, found), 1):
                score, rank = float(scores[query, image]), place.get(image, math.nan)
                rows.append([float(query), float(position), float(image), score, float(rank)])
        return ["query", "position", "image", "score", "teacher's rank"], rows

    def _stopped(self) -> bool:
        scores = [entry["score"] for entry in self.history if "score" in entry]
        return 0 < self.config.patience <= len(scores) - 1 - int(np.argmax(scores))

    def _save(self) -> None:
        if not self.group.first:
            return
        state = {
            "step": self.step,
            "loss_sum": self.loss_sum,
            "ranker": self.ranker.state_dict(),
            "averaged": self.averaged.state_dict() if self.averaged is not None else {},
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
            "best_state": self.best_state,
        }
        runs.save_checkpoint(self.checkpoint_file, self.identity, state)

    def _resume(self) -> None:
        saved = runs.load_checkpoint(self.checkpoint_file, self.identity, self.device)
        self.step, self.history, self.best_state = saved["step"], saved["history"], saved["best_state"]
        self.loss_sum.copy_(saved["loss_sum"])
        self.ranker.load_state_dict(saved["ranker"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.averaged is not None:
            self.averaged.load_state_dict(saved["averaged"])


def _seed(*key: int | str) -> int:
    return keyed_generator(*key).initial_seed()
