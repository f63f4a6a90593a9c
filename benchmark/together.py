"""Many models retrained at a time on one GPU: every step of every model is one replay of a CUDA graph.

A step of the small testbed's model is some thousand kernels of a few microseconds, which a GPU finishes sooner than
Python launches them and which fill a small part of it. So each *lane* keeps one model, its optimiser, its moving
average and what is random in all of its steps in fixed memory; a step is captured once, on a stream of its own, and
replayed without Python's help, while the other lanes' steps run beside it. A lane takes its next model by overwriting
that memory. Draws, order and recipe are those of `abu.training`, so that a model differs from one trained on a CPU by
rounding only. Without CUDA the same functions run as they are, one lane after the other.

On an H200 sixteen lanes took 3.0 s a model. Kernels of several streams hardly overlapped there: a step is 2.5 ms of the
GPU for each model, so that more than a few lanes gain little.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from abu.diffusion_loss import NoiseSchedule, example_losses
from abu.encoded import LoadedPictures
from abu.influence import all_draws
from abu.models import build_denoiser, initial_denoiser, noise_schedule
from abu.plan import Collection
from abu.sampler import Sampler
from abu.testbed import Testbed
from abu.train_diffusion import StepDraws, refilled, step_draws, step_loss
from abu.training import LoopConfig, batch_rows, learning_rate
from benchmark.retrainer import SECONDS, Retrainer, Retraining, kept_images, model_arrays
from fastgda.core import keyed_generator

MEASURED_AT_ONCE = 1024
"""Queries, times draws, of one forward pass of a measurement."""


@dataclass(frozen=True)
class Schedule:
    """All that is decided of a model's training before it begins, on the CPU."""

    job: Retraining
    weights: dict[str, Tensor]
    """Before the first step."""
    rows: Tensor
    """Ids of each step's images [S, B]."""
    draws: StepDraws
    """Of all steps: [S, B], [S, B, c, h, w] and [S, B]."""


def plan_training(
    job: Retraining, images: Tensor, loop: LoopConfig, timesteps: int, weights: dict[str, Tensor]
) -> Schedule:
    """The schedule of a model trained on `images` [N, c, h, w] but for those removed."""
    kept, loop = torch.from_numpy(kept_images(job, len(images))), replace(loop, seed=job.seed)
    rows, draws = [], []
    for step in range(loop.steps):
        generator = keyed_generator("train", loop.seed, step)
        draws.append(step_draws((loop.batch_size, *images.shape[1:]), timesteps, generator))
        whole = torch.from_numpy(batch_rows(step, len(images), loop))
        rows.append(refilled(whole, kept, len(images), generator))
    stacked = StepDraws(
        torch.stack([draw.timesteps for draw in draws]),
        torch.stack([draw.noise for draw in draws]),
        torch.stack([draw.captioned for draw in draws]),
    )
    return Schedule(job, weights, torch.stack(rows), stacked)


class Judged:
    """Queries with the draws that every model's losses are measured on, noised once for all models."""

    def __init__(self, retrainer: Retrainer, schedule: NoiseSchedule) -> None:
        config, splits = retrainer.config, list(retrainer.queries.values())
        parts = []
        for split in splits:
            draws = all_draws(config.judged_draws, split, 0)
            noised = [(timesteps, *schedule.noised(split.latents, noise, timesteps)) for timesteps, noise in draws]
            parts.append([torch.stack(column) for column in zip(*noised, strict=True)])
        timesteps, noisy, target = (torch.cat(column, 1) for column in zip(*parts, strict=True))
        self.sizes = {split.role: len(split.ids) for split in splits}
        self.queries = sum(self.sizes.values())
        self.count = len(timesteps)
        together = max(
            divisor
            for divisor in range(1, self.count + 1)
            if self.count % divisor == 0 and (divisor == 1 or divisor * self.queries <= MEASURED_AT_ONCE)
        )
        self.batches = self.count // together
        self.timesteps, self.noisy, self.target = (
            values.reshape(self.batches, together * self.queries, *values.shape[2:])
            for values in (timesteps, noisy, target)
        )
        self.text = torch.cat([split.text for split in splits]).repeat(together, 1, 1)

    def by_split(self, losses: Tensor) -> dict[str, np.ndarray]:
        """losses_<split> of the sums [Q] over all draws."""
        parts = (losses / self.count).cpu().split(list(self.sizes.values()))
        return {f"losses_{name}": part.numpy() for name, part in zip(self.sizes, parts, strict=True)}


class Lane:
    """A place for one model at a time."""

    def __init__(self, testbed: Testbed, retrainer: Retrainer, data: tuple[Tensor, Tensor], judged: Judged) -> None:
        """`data`: latents [N, c, h, w] and token states [N, T, d] of the training set, shared by all lanes."""
        device = retrainer.device
        self.stream = torch.cuda.Stream() if device.type == "cuda" else None
        self.loop, self.data, self.judged = testbed.diffusion_loop, data, judged
        self.schedule = noise_schedule(testbed.diffusion)
        self.schedule = replace(self.schedule, levels=self.schedule.levels.to(device))
        self.model = build_denoiser(testbed.diffusion).to(device)
        self.parameters = list(self.model.parameters())
        self.averaged = [parameter.detach().clone() for parameter in self.parameters]
        self.rates, self.newest = (values.to(device) for values in _curves(self.loop))
        self.rate = torch.zeros((), device=device)
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            self.rate,
            weight_decay=self.loop.weight_decay,
            fused=True,
            capturable=device.type == "cuda",
        )
        steps, batch, shape = self.loop.steps, self.loop.batch_size, data[0].shape[1:]
        self.rows = torch.zeros(steps, batch, dtype=torch.int64, device=device)
        self.draws = StepDraws(
            torch.zeros(steps, batch, dtype=torch.int64, device=device),
            torch.zeros(steps, batch, *shape, device=device),
            torch.zeros(steps, batch, dtype=torch.bool, device=device),
        )
        self.place = torch.zeros(1, dtype=torch.int64, device=device)
        self.history = torch.zeros(steps, device=device)
        self.losses = torch.zeros(judged.queries, dtype=torch.float64, device=device)
        test = retrainer.queries["test"]
        self.inputs = (
            torch.zeros(2 * len(test.ids), *shape, device=device),
            torch.zeros((), dtype=torch.int64, device=device),
            torch.zeros(2 * len(test.ids), *test.text.shape[1:], device=device),
        )
        self.predicted = torch.zeros_like(self.inputs[0])
        self.train_step = self._captured(self._train_step)
        self.measure_step = self._captured(self._measure_step)
        self.predict = self._captured(self._predict)

    def begin(self, schedule: Schedule) -> None:
        """Takes a model in."""
        with self._on(), torch.no_grad():
            for name, value in self.model.state_dict().items():
                value.copy_(schedule.weights[name])
            self._copy(self.averaged, self.parameters)
            for state in self.optimizer.state.values():
                for value in state.values():
                    value.zero_()
            self.rows.copy_(schedule.rows)
            for name, value in vars(self.draws).items():
                value.copy_(getattr(schedule.draws, name))
            self.place.zero_()

    def advance(self) -> None:
        """One training step."""
        with self._on():
            self.train_step()

    def finish(self) -> None:
        """The averaged weights become the model's; the losses of the judged queries are summed over all draws."""
        with self._on():
            self._copy(self.parameters, self.averaged)
            self.place.zero_()
            self.losses.zero_()
            for _ in range(self.judged.batches):
                self.measure_step()

    def sample(self, sampler: Sampler, text: Tensor, seeds: list[int], steps: int) -> Tensor:
        """The test queries sampled again."""
        with self._on():
            return sampler.latents(_Graphed(self), text, seeds, steps)

    def trouble(self) -> str | None:
        """What is wrong with the model: a loss that is not finite."""
        for name, values in (("step", self.history.cpu()), ("query", self.losses.cpu())):
            bad = (~torch.isfinite(values)).nonzero()
            if len(bad):
                return f"the loss of {name} {bad[0].item()} became {values[bad[0]].item()}"
        return None

    def _train_step(self) -> None:
        place = self.place
        for parameter in self.parameters:
            parameter.grad = None
        self.rate.copy_(self.rates[place][0])
        rows = self.rows[place][0]
        draws = StepDraws(*(values[place][0] for values in vars(self.draws).values()))
        loss = step_loss(self.model, self.schedule, self.data[0][rows], self.data[1][rows], draws)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.loop.gradient_clip)
        self.optimizer.step()
        with torch.no_grad():
            moved = torch._foreach_sub(self.parameters, self.averaged)
            torch._foreach_mul_(moved, self.newest[place][0])
            torch._foreach_add_(self.averaged, moved)
            self.history[place] = loss.detach()
            place += 1

    @torch.no_grad()
    def _measure_step(self) -> None:
        place, judged = self.place, self.judged
        noisy, target, timesteps = (values[place][0] for values in (judged.noisy, judged.target, judged.timesteps))
        losses = example_losses(self.model, noisy, target, timesteps, judged.text)
        self.losses += losses.double().view(-1, judged.queries).sum(0)
        place += 1

    @torch.no_grad()
    def _predict(self) -> None:
        self.predicted.copy_(self.model(*self.inputs).sample)

    def denoise(self, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """What the model predicts for the test queries, without captions and with them."""
        for kept, value in zip(self.inputs, (latents, timestep, text), strict=True):
            kept.copy_(value)
        self.predict()
        return self.predicted.clone()

    def _captured(self, function: Callable[[], None]) -> Callable[[], None]:
        """`function` as a graph on the lane's stream."""
        if self.stream is None:
            return function
        self.place.zero_()
        self.stream.wait_stream(torch.cuda.current_stream())
        with self._on():
            # libraries choose their algorithms and the optimiser makes its state
            function()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            function()
        return graph.replay

    def _on(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    @staticmethod
    @torch.no_grad()
    def _copy(to: list[Tensor], what: list[Tensor]) -> None:
        torch._foreach_copy_(to, what)


class _Graphed(nn.Module):
    """A lane's denoiser as the sampler calls it: one replay of its graph."""

    def __init__(self, lane: Lane) -> None:
        super().__init__()
        self.model, self.denoise = lane.model, lane.denoise

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor) -> _Prediction:
        """See `Lane.denoise`."""
        return _Prediction(self.denoise(latents, timestep, text))


@dataclass(frozen=True)
class _Prediction:
    sample: Tensor


def _curves(loop: LoopConfig) -> tuple[Tensor, Tensor]:
    """(learning rate, weight of the new weights in their moving average) of each step [S]."""
    rates = torch.tensor([learning_rate(step, loop) for step in range(loop.steps)])
    return rates, torch.tensor([1 - min(loop.ema, (1 + step) / (10 + step)) for step in range(loop.steps)])


class Together:
    """Lanes, and what they share."""

    def __init__(self, retrainer: Retrainer, count: int) -> None:
        self.retrainer, testbed, device = retrainer, retrainer.testbed, retrainer.device
        if not (isinstance(testbed, Testbed) and isinstance(retrainer.pictures, LoadedPictures)):
            raise ValueError(f"--together: expected a testbed, whose training set is small, found {testbed.name}")
        self.sampler, self.latents = testbed.sampler(device), retrainer.pictures.latents
        self.schedule = noise_schedule(testbed.diffusion)
        self.judged = Judged(retrainer, self.schedule)
        data = self.latents.to(device), retrainer.pictures.text.to(device)
        self.lanes = [Lane(testbed, retrainer, data, self.judged) for _ in range(count)]
        self.weights_of = lru_cache(2 * count)(lambda seed: initial_denoiser(testbed.diffusion, seed).state_dict())

    def train(self, jobs: Sequence[Retraining]) -> Iterator[tuple[Retraining, dict[str, np.ndarray] | str]]:
        """Each model's arrays as `Retrainer.compute` makes them, or what is wrong with it; a round at a time.

        Seconds are a model's share of its round.
        """
        rounds = [jobs[start : start + len(self.lanes)] for start in range(0, len(jobs), len(self.lanes))]
        with ThreadPoolExecutor() as pool:
            planned = self._plan(pool, rounds[0])
            for index, some in enumerate(rounds):
                began = time.perf_counter()
                lanes = self.lanes[: len(some)]
                for lane, future in zip(lanes, planned, strict=True):
                    lane.begin(future.result())
                if index + 1 < len(rounds):
                    planned = self._plan(pool, rounds[index + 1])
                latents = self._round(lanes)
                seconds = np.array((time.perf_counter() - began) / len(some))
                for job, lane, sampled in zip(some, lanes, latents, strict=True):
                    losses = self.judged.by_split(lane.losses)
                    found = model_arrays(job, lane.model, losses, sampled) | {SECONDS: seconds}
                    yield job, lane.trouble() or found

    def _plan(self, pool: ThreadPoolExecutor, jobs: Sequence[Retraining]) -> list[Future[Schedule]]:
        loop, images = self.retrainer.loop, self.latents
        # weights are drawn from torch's one global generator, so not by the threads
        weights = [self.weights_of(job.seed) for job in jobs]
        return [
            pool.submit(plan_training, job, images, loop, len(self.schedule), begin)
            for job, begin in zip(jobs, weights, strict=True)
        ]

    def _round(self, lanes: Sequence[Lane]) -> list[Tensor]:
        """Trains and measures a model in each lane; the test queries as each of them samples them."""
        retrainer = self.retrainer
        for _ in range(retrainer.loop.steps):
            for lane in lanes:
                lane.advance()
        for lane in lanes:
            lane.finish()
        text, steps = retrainer.queries["test"].text, retrainer.config.sampling_steps
        latents = [lane.sample(self.sampler, text, retrainer.seeds, steps) for lane in lanes]
        if retrainer.device.type == "cuda":
            torch.cuda.synchronize()
        return latents


def run_together(retrainer: Retrainer, collection: Collection, jobs: Sequence[Retraining], count: int) -> None:
    """Trains and stores the missing models, `count` at a time; an interruption loses one round.

    `ValueError` at the end if some did not train; failed.jsonl lists them.
    """
    missing, failed = collection.missing(jobs), 0
    if not missing:
        return
    collection.started()
    exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
    with exact, tqdm(total=len(jobs), initial=len(jobs) - len(missing), unit="model") as bar:
        for job, found in Together(retrainer, min(count, len(missing))).train(missing):
            if isinstance(found, str):
                collection.failed(job, 1, found)
                failed += 1
                continue
            collection.store(job, found)
            bar.update()
    if failed:
        raise ValueError(
            f"{collection.folder}: expected {len(missing)} models to train, {failed} did not; see failed.jsonl"
        )
