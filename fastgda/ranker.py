"""The ranker f = g o phi of the paper (section 3.3): an MLP g on frozen features phi, compared by cosine similarity.

The modelled normalised rank of training image z for query q is pi = sigmoid(scale * r + bias), r = cos(f(q), f(z)), and
a small pi means influential. The released checkpoints learned a negative scale: similar is influential. Training may
also end with a positive one; `Ranker.embed_queries` turns the sign then, so that for any ranker a higher dot product of
`embed_queries` and `embed` means more influential. Evaluation, index and demo use these two methods only.

A ranker trained by ordinal regression has several heads, each with its own feature, scale and bias. What ranks the
images is the sum of the heads' logits, and that is one inner product of the concatenated features.

A checkpoint is the released state dict and nothing else by its keys; the architecture is read from the shapes, the
number of heads from that of `scale`.
What a reader may want besides (dropout, feature type) travels in the state dict's `_metadata`, which torch ignores.
"""

from __future__ import annotations

import math
import pickle
from collections import OrderedDict
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import ModelHubMixin, hf_hub_download
from torch import Tensor, nn
from torch.nn import functional

from fastgda.core import atomic_path, require_file

NORMS = ("none", "layer", "batch")
METADATA_KEY = "fastgda"
HUB_FILE = "ranker.pth"
"""The checkpoint's name in a repository of the Hugging Face hub."""
ROWS = 4096
"""Rows embedded at a time outside training."""


@dataclass(frozen=True)
class RankerConfig:
    """Architecture of the ranker."""

    in_dim: int
    """D, the dimension of the frozen feature."""
    hidden_sizes: tuple[int, ...] = (768, 768, 768)
    out_feat_dim: int = 768
    """dimension of a head's feature"""
    input_norm: str = "none"
    """`layer` (LayerNorm), `batch` (BatchNorm1d) or `none`, applied to the feature."""
    dropout: float = 0.1
    residual: bool = False
    """Adds a linear map of the normalised feature, orthogonal at first, to the output of the MLP."""
    heads: int = 1
    """Features per image, compared one by one; their concatenation is the embedding."""

    def __post_init__(self) -> None:
        sizes = (self.in_dim, *self.hidden_sizes, self.out_feat_dim)
        if min(*sizes, self.heads) < 1:
            raise ValueError(f"expected positive layer sizes and heads, found {sizes} and {self.heads}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"expected dropout in [0, 1), found {self.dropout}")
        if self.input_norm not in NORMS:
            raise ValueError(f"expected input_norm among {NORMS}, found {self.input_norm!r}")

    @property
    def embedding_dim(self) -> int:
        """Dimension of the embedding: all heads."""
        return self.heads * self.out_feat_dim


class Dropout(nn.Dropout):
    """Dropout whose mask is that of the whole batch where this process embeds a share of its rows.

    One process draws its mask in the same way, because torch's own dropout draws another one on CUDA.
    """

    batch: tuple[int, int] | None = None
    """(first row of the share, rows of the batch); absent where all rows are here."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Drops with probability `p` in training."""
        if not self.training or not self.p:
            return hidden
        first, rows = self.batch or (0, len(hidden))
        mask = hidden.new_empty(rows, hidden.shape[1]).bernoulli_(1 - self.p).div_(1 - self.p)
        return hidden * mask[first : first + len(hidden)]


class MLP(nn.Module):
    """Linear - ReLU - dropout for each hidden size, then a linear output layer."""

    def __init__(self, config: RankerConfig) -> None:
        super().__init__()
        self.input_norm: nn.Module | None = None
        if config.input_norm != "none":
            self.input_norm = (nn.LayerNorm if config.input_norm == "layer" else nn.BatchNorm1d)(config.in_dim)
        sizes = (config.in_dim, *config.hidden_sizes)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.output_layer = nn.Linear(sizes[-1], config.embedding_dim)
        self.dropout = Dropout(config.dropout)
        self.residual: nn.Linear | None = None
        if config.residual:
            self.residual = nn.Linear(config.in_dim, config.embedding_dim, bias=False)
            for head in self.residual.weight.detach().chunk(config.heads):
                nn.init.orthogonal_(head)
            # the untuned feature's geometry is the starting point, so the MLP begins as a small correction to it
            nn.init.zeros_(self.output_layer.bias)
            with torch.no_grad():
                self.output_layer.weight.mul_(0.1)

    def forward(self, features: Tensor) -> Tensor:
        """[B, D] -> [B, embedding_dim]."""
        hidden = features if self.input_norm is None else self.input_norm(features)
        for layer in self.layers:
            hidden = self.dropout(functional.relu(layer(hidden)))
        out = self.output_layer(hidden)
        return out if self.residual is None else out + self.residual(functional.normalize(features, dim=-1))


class Ranker(
    nn.Module,
    ModelHubMixin,
    library_name="fastgda",
    tags=["data-attribution"],
    paper_url="https://arxiv.org/abs/2511.10721",
):
    """MLP, learned scale and bias of each head.

    `save_pretrained`, `push_to_hub` and `from_pretrained` of huggingface_hub write and read a folder that holds the
    checkpoint (`HUB_FILE`) and the architecture as JSON for readers.
    """

    def __init__(self, config: RankerConfig, init_scale: float = -5.0) -> None:
        """`init_scale`: scale at first; the bias starts at -scale/2, so that pi is 1/2 at cosine 1/2, small at 1."""
        super().__init__()
        self.config = config
        self.info: dict[str, Any] = {}
        self.mlp = MLP(config)
        self.scale = nn.Parameter(torch.full((config.heads,), float(init_scale)))
        self.bias = nn.Parameter(torch.full((config.heads,), -float(init_scale) / 2))

    def forward(self, features: Tensor) -> Tensor:
        """[B, D] features -> [B, embedding_dim], each head a unit vector, float32."""
        heads = self.mlp(features).float().unflatten(-1, (self.config.heads, -1))
        return functional.normalize(heads, dim=-1).flatten(-2)

    def similarity(self, queries: Tensor, images: Tensor, pairs: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Cosines of outputs of `forward`: [B, M], or [P] of the named pairs of rows; [heads, ...] of several heads."""
        left, right = (rows.unflatten(-1, (self.config.heads, -1)) for rows in (queries, images))
        if pairs is None:
            cosines = torch.matmul(left.transpose(0, 1), right.permute(1, 2, 0))
        else:
            cosines = (left[pairs[0]] * right[pairs[1]]).sum(dim=-1).T
        return cosines if self.config.heads > 1 else cosines[0]

    def logits(self, similarity: Tensor) -> Tensor:
        """The logits of the normalised rank pi for the cosines that `similarity` gives; low = influential.

        A single head takes cosines of any shape.
        """
        if self.config.heads == 1:
            return self.scale * similarity + self.bias
        shape = (-1, *[1] * (similarity.ndim - 1))
        return self.scale.view(shape) * similarity + self.bias.view(shape)

    @property
    def head_weights(self) -> Tensor:
        """[heads] shares of the heads in the influence: -scale / sum |scale|; +1 or -1 for a single head.

        The sum of the logits, sum_k scale_k r_k + bias_k, falls with sum_k head_weights_k r_k, at the same rate for all
        images, so both rank alike.
        """
        total = self.scale.detach().abs().sum()
        return -self.scale.detach() / total if total else torch.full_like(self.scale, 1 / len(self.scale))

    @torch.no_grad()
    def embed(self, features: np.ndarray | Tensor) -> Tensor:
        """[N, D] features of training images -> [N, embedding_dim] unit embeddings on the ranker's device."""
        training, device = self.training, self.scale.device
        self.eval()
        out = torch.empty(len(features), self.config.embedding_dim, device=device)
        try:
            for start in range(0, len(features), ROWS):
                rows = torch.as_tensor(features[start : start + ROWS], dtype=torch.float32).to(device)
                out[start : start + ROWS] = self(rows) / math.sqrt(self.config.heads)
        finally:
            self.train(training)
        return out

    def embed_queries(self, features: np.ndarray | Tensor) -> Tensor:
        """[Q, D] features of queries -> [Q, embedding_dim]; `embed_queries(q) @ embed(z).T` is the influence.

        It is the heads' cosines, averaged by `head_weights`, hence within [-1, 1].
        """
        weights = (self.head_weights * self.config.heads).repeat_interleave(self.config.out_feat_dim)
        return self.embed(features) * weights

    def _save_pretrained(self, save_directory: Path) -> None:
        save_ranker(save_directory / HUB_FILE, self)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> Ranker:
        if Path(model_id).is_dir():
            return load_ranker(Path(model_id) / HUB_FILE)
        names = ("revision", "cache_dir", "force_download", "local_files_only", "token")
        return load_ranker(hf_hub_download(model_id, HUB_FILE, **{name: options[name] for name in names}))


def save_ranker(path: str | Path, ranker: Ranker, dtype: torch.dtype = torch.float32, **info: Any) -> None:
    """Writes the released state dict atomically; `info` (strings and numbers) rides along as metadata.

    `dtype`: of the stored weights; they are read as float32 again.
    """
    state = OrderedDict(
        (name, value.detach().cpu().to(dtype if value.is_floating_point() else value.dtype))
        for name, value in ranker.state_dict().items()
    )
    state._metadata = {  # type: ignore[attr-defined]
        METADATA_KEY: {**asdict(ranker.config), **ranker.info, **info}
    }
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def load_ranker(path: str | Path, device: torch.device | str = "cpu", in_dim: int | None = None) -> Ranker:
    """Reads a ranker of ours or a released one, in evaluation mode; `info` holds its metadata.

    `in_dim`: the feature dimension it must take. Raises `ValueError` naming the file if it is missing, damaged, not a
    ranker, of another input dimension, or not finite.
    """
    path = require_file(path, "python train.py")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path}: expected a checkpoint of tensors, found a damaged or unsafe file ({reason})"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: expected a state dict of tensors, found another structure")
    metadata = getattr(state, "_metadata", {}).get(METADATA_KEY, {})
    try:
        config = infer_config(state, dropout=metadata.get("dropout", RankerConfig.dropout))
        ranker = Ranker(config)
        ranker.load_state_dict(state, strict=True)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: expected a ranker's state dict, found: {' '.join(str(error).split())}") from error
    bad = [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise ValueError(f"{path}: expected finite weights, found NaN or infinity in {bad[0]}")
    if in_dim is not None and config.in_dim != in_dim:
        raise ValueError(f"{path}: expected a ranker of {in_dim}-dimensional features, found one of {config.in_dim}")
    ranker.info = {key: value for key, value in metadata.items() if key not in asdict(config)}
    return ranker.to(device).eval()


def infer_config(state: dict[str, Tensor], dropout: float = RankerConfig.dropout) -> RankerConfig:
    """The architecture that a state dict's keys and shapes tell; `ValueError` if they are not a ranker's."""
    for name in ("mlp.output_layer.weight", "scale", "bias"):
        if name not in state:
            raise ValueError(f"no {name}")
    heads = state["scale"].numel()
    hidden: list[Tensor] = []
    while (weight := state.get(f"mlp.layers.{len(hidden)}.weight")) is not None:
        hidden.append(weight)
    weights = [*hidden, state["mlp.output_layer.weight"]]
    if any(weight.ndim != 2 for weight in weights):
        raise ValueError("weights that are no matrices")
    if heads == 0 or len(weights[-1]) % heads:
        raise ValueError(f"{len(weights[-1])} outputs, which {heads} heads do not share equally")
    input_norm = "none"
    if "mlp.input_norm.weight" in state:
        input_norm = "batch" if "mlp.input_norm.running_mean" in state else "layer"
    return RankerConfig(
        in_dim=weights[0].shape[1],
        hidden_sizes=tuple(weight.shape[0] for weight in hidden),
        out_feat_dim=weights[-1].shape[0] // heads,
        input_norm=input_norm,
        dropout=dropout,
        residual="mlp.residual.weight" in state,
        heads=heads,
    )
