"""One sweep over training images for several queries: the losses at every θ_{−ẑ}, sharing what no query changes.

A query moves the text key/value weights only. So for a batch of images the noised inputs and the token states are made
once; the modules that run before the first moved layer run once; and because the tokens do not depend on (view, t, ε),
keys and values are computed once for all the losses of an image with a caption. What is left is run query by query.

A loss is the same number, bit for bit, in any set of images and beside any other query: the network only ever sees
batches of `rows` rows, the last one padded, so that the processor takes the same kernels, and their rows are computed
alike wherever they stand. Whether they are is tried on the model itself before the first loss; where it does not hold
(seen for batches of 10 rows on two threads, and in float32 for layers of 16 channels; not for the testbed's model and
powers of two) a batch holds the losses of one image with one caption and nothing else. Losses are averaged and
subtracted in float64.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from abu.diffusion_loss import NoiseSchedule, example_losses
from abu.layers import Layer, select_layers
from abu.loss_draws import LossDraws, TrainingImages
from abu.prefix import modules_before
from abu.unlearn import Change
from fastgda.core import keyed_generator

log = logging.getLogger(__name__)
Weights = dict[str, tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class SweepConfig:
    """How the losses are computed."""

    rows: int = 128
    """Losses that the network computes at once, always as many; best a power of two."""
    bf16: bool = False
    """The network under bfloat16 autocast; losses and their differences stay in float32 and better."""

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError(f"--rows: expected at least 1, found {self.rows}")


@dataclass(frozen=True)
class Batch:
    """Inputs of the network for some (image, caption) pairs, the groups; each has all its views, timesteps and ε."""

    groups: list[tuple[int, int]]
    """(training id, caption) of each group; padding is not listed."""
    noisy: Tensor
    """[rows, c, h, w]."""
    target: Tensor
    timesteps: Tensor
    """[rows]."""
    tokens: Tensor
    """[groups with padding, T, d]."""
    owner: Tensor
    """[rows] the group that a row belongs to."""
    text: Tensor
    """tokens[owner]."""


class Sweep:
    """Losses of training images under a frozen model and under models that have unlearned a query."""

    def __init__(
        self,
        model: nn.Module,
        schedule: NoiseSchedule,
        images: TrainingImages,
        draws: LossDraws,
        config: SweepConfig = SweepConfig(),
    ) -> None:
        images.check(draws)
        self.model = model.eval().requires_grad_(False)
        self.schedule, self.images, self.draws, self.config = schedule, images, draws, config
        self.layers = select_layers(model)
        weight = next(iter(self.layers.values())).weight
        self.device, self.dtype = weight.device, weight.dtype
        self.groups, self.rows = max(1, config.rows // draws.per_caption), config.rows
        if draws.per_caption > config.rows:
            self.rows = draws.per_caption
        self.prefix: list[str] | None = None
        self._batch: Batch | None = None
        self._weights: Weights = {}
        self._shared: dict[str, Any] = {}

    @torch.inference_mode()
    def losses(
        self,
        ids: Sequence[int],
        changes: Sequence[Change | None],
        needed: np.ndarray | None = None,
        progress: bool = False,
    ) -> np.ndarray:
        """𝓛(z, θ0 + change) [changes, ids, views], float64, averaged over captions, timesteps and draws.

        `None` among the changes is θ0 itself. `needed` [changes, ids] says which are wanted (default: all); the others
        come back as NaN. The noised inputs of all `ids` are held at once. Raises `ValueError` naming the image, caption
        and timestep of a loss that is not finite.
        """
        self.images.check_ids(ids, "images")
        needed = np.ones((len(changes), len(ids)), bool) if needed is None else needed
        captions, per_caption = self.draws.captions, self.draws.per_caption
        found = torch.full((len(changes), len(ids), captions, per_caption), torch.nan, dtype=torch.float64)
        if self.prefix is None:
            self._prepare()
        noised: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}
        weights = [self._moved(change) for change in changes]
        total = int(needed.sum()) * captions * per_caption
        bar = tqdm(total=total, desc="losses", unit="loss", unit_scale=True, mininterval=1.0, disable=not progress)
        patterns, member = np.unique(needed, axis=0, return_inverse=True)
        with self._patched(), bar:
            for index, pattern in enumerate(patterns):
                queries = np.flatnonzero(member.ravel() == index)
                places = [
                    (column, caption) for column in np.flatnonzero(pattern).tolist() for caption in range(captions)
                ]
                for start in range(0, len(places), self.groups):
                    part = places[start : start + self.groups]
                    self._batch = self._make_batch([(ids[column], c) for column, c in part], noised)
                    self._shared = {}
                    for query in queries:
                        computed = self._evaluate(weights[query])
                        for (column, caption), values in zip(part, computed, strict=True):
                            found[query, column, caption] = values
                        bar.update(computed.numel())
                self._shared = {}
        return self._mean(found).numpy()

    def _mean(self, losses: Tensor) -> Tensor:
        # One addition after the other: the order of a reduction would depend on how many images there are.
        found = losses.unflatten(-1, (self.draws.views, -1)).transpose(2, 3)
        cells = found.flatten(3).unbind(-1)
        total = torch.zeros_like(cells[0])
        for cell in cells:
            total += cell
        return total / len(cells)

    def _noised(self, image: int, caption: int) -> tuple[Tensor, Tensor, Tensor]:
        timesteps, noise = self.draws.of(image, caption, self.images.shape, len(self.schedule))
        views = self.images.views(image, self.draws.views).to(self.dtype)
        latents = views.repeat_interleave(self.draws.per_caption // self.draws.views, 0)
        noisy, target = self.schedule.noised(latents, noise.to(self.dtype), timesteps)
        return noisy, target, timesteps

    def _make_batch(
        self, groups: list[tuple[int, int]], noised: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]]
    ) -> Batch:
        for group in groups:
            if group not in noised:
                noised[group] = self._noised(*group)
        inputs = [torch.cat(parts) for parts in zip(*(noised[group] for group in groups), strict=True)]
        tokens = torch.stack([self.images.tokens(*group) for group in groups]).to(self.dtype)
        return self._pad(groups, inputs, tokens)

    def _pad(self, groups: list[tuple[int, int]], inputs: list[Tensor], tokens: Tensor) -> Batch:
        owner = torch.arange(len(groups)).repeat_interleave(self.draws.per_caption)
        padded = [_filled(tensor, self.rows).to(self.device) for tensor in (*inputs, owner)]
        tokens = _filled(tokens, self.groups).to(self.device)
        noisy, target, timesteps, owner = padded
        return Batch(groups, noisy, target, timesteps, tokens, owner, tokens[owner])

    def _moved(self, change: Change | None) -> Weights:
        """Weights and biases of the key/value layers after `change`."""
        weights: Weights = {}
        for name, layer in self.layers.items():
            weight, bias = layer.weight, layer.bias
            if change is not None:
                moved = change[name].to(weight)
                if bias is not None:
                    bias, moved = bias + moved[:, -1], moved[:, :-1]
                weight = weight + moved.reshape(weight.shape)
            weights[name] = (weight, bias)
        return weights

    def _evaluate(self, weights: Weights) -> Tensor:
        """Losses [groups, per_caption] of the batch, in float32 or better; padding is computed and dropped."""
        batch = self._batch
        assert batch is not None
        self._weights = weights
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16):
            losses = example_losses(self.model, batch.noisy, batch.target, batch.timesteps, batch.text)
        losses = losses[: len(batch.groups) * self.draws.per_caption]
        bad = (~torch.isfinite(losses)).nonzero()
        if len(bad):
            row = int(bad[0])
            image, caption = batch.groups[row // self.draws.per_caption]
            where = f"training image {image}, caption {caption}, timestep {int(batch.timesteps[row])}"
            raise ValueError(f"{where}: expected a finite loss, found {losses[row]}")
        return losses.view(len(batch.groups), -1).cpu()

    @contextmanager
    def _patched(self) -> Iterator[None]:
        """The model with its key/value layers at `_weights` and with `_shared` outputs of the modules before them."""
        modules, prefix = dict(self.model.named_modules()), list(self.prefix or [])
        for name, layer in self.layers.items():
            layer.forward = self._layer_forward(name, layer)  # type: ignore[method-assign]
        for name in prefix:
            modules[name].forward = self._shared_forward(name, modules[name].forward)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for name in [*self.layers, *prefix]:
                del modules[name].forward

    def _layer_forward(self, name: str, layer: Layer) -> Any:
        def forward(inputs: Tensor) -> Tensor:
            weight, bias = self._weights[name]
            if isinstance(layer, nn.Conv2d):
                return layer._conv_forward(inputs, weight, bias)
            batch = self._batch
            assert batch is not None
            if not _is_beginning(inputs, batch.text):
                return F.linear(inputs, weight, bias)
            groups = batch.tokens[:, : inputs.shape[1]]
            # One product for each group, whose shape never changes; bfloat16 would round the moved weights back.
            with torch.autocast(self.device.type, enabled=False):
                return torch.stack([F.linear(tokens, weight, bias) for tokens in groups])[batch.owner]

        return forward

    def _shared_forward(self, name: str, original: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            if name not in self._shared:
                self._shared[name] = original(*args, **kwargs)
            return self._shared[name]

        return forward

    def _prepare(self) -> None:
        """Finds the modules before the first moved layer, and how many groups a batch may hold."""
        self.prefix = []
        self._batch = self._random_batch()
        with self._patched(), torch.inference_mode(False), torch.no_grad():
            self._batch = _ordinary(self._batch)
            self._weights = self._moved(None)
            self.prefix = modules_before(self.model, self.layers, lambda: self._evaluate(self._weights))
        if self.groups > 1 and not self._position_independent():
            log.warning("this processor's kernels treat rows by their place: one image and caption to a batch")
            self.groups, self.rows = 1, self.draws.per_caption

    def _random_batch(self) -> Batch:
        generator = keyed_generator("sweep", "trial")
        count, shape = self.groups * self.draws.per_caption, self.images.shape
        noisy, target = (torch.randn(count, *shape, generator=generator).to(self.dtype) for _ in range(2))
        timesteps = torch.randint(len(self.schedule), (count,), generator=generator)
        tokens = torch.randn(self.groups, *self.images.text.shape[2:], generator=generator).to(self.dtype)
        return self._pad([(-1, -1)] * self.groups, [noisy, target, timesteps], tokens)

    def _position_independent(self) -> bool:
        """Whether every group gets the same losses, bit for bit, in other places of a batch."""
        weights, batch = self._moved(None), self._random_batch()
        with self._patched():
            self._shared, self._batch = {}, batch
            expected = self._evaluate(weights)
            for shift in {1, self.groups // 2 or 1}:
                inputs = [
                    tensor[: self.groups * self.draws.per_caption].roll(shift * self.draws.per_caption, 0)
                    for tensor in (batch.noisy, batch.target, batch.timesteps)
                ]
                self._shared, self._batch = {}, self._pad(batch.groups, inputs, batch.tokens.roll(shift, 0))
                if not torch.equal(self._evaluate(weights), expected.roll(shift, 0)):
                    return False
        self._shared = {}
        return True


def _filled(tensor: Tensor, rows: int) -> Tensor:
    """`tensor` with its first row repeated at the end, to `rows` rows."""
    return torch.cat([tensor, tensor[:1].expand(rows - len(tensor), *tensor.shape[1:])])


def _is_beginning(tokens: Tensor, text: Tensor) -> bool:
    """Whether `tokens` [rows, T, d] is `text`, or its first rows: a model may carry more than tokens in it."""
    same_place = tokens.data_ptr() == text.data_ptr() and tokens.stride() == text.stride()
    return same_place and len(tokens) == len(text) and tokens.shape[-1] == text.shape[-1]


def _ordinary(batch: Batch) -> Batch:
    """The batch with tensors that keep count of what is written into them, which inference tensors do not."""
    return replace(
        batch,
        noisy=batch.noisy.clone(),
        target=batch.target.clone(),
        timesteps=batch.timesteps.clone(),
        tokens=batch.tokens.clone(),
        owner=batch.owner.clone(),
        text=batch.text.clone(),
    )
