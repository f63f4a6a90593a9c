"""Everything a training run of the ranker depends on besides its data, and two named recipes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fastgda.losses import HEADS
from fastgda.ranker import RankerConfig


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
    """dimension of the embedding (with --loss ordinal, of each of its nine heads)"""
    residual: bool = False
    """add a linear map of the feature, orthogonal at first, to the output of the MLP"""
    init_scale: float = -5.0
    """learned scale at first; the bias starts at minus half of it"""
    loss: Literal["bce", "mse", "ordinal", "score", "listwise"] = "bce"
    """bce on normalised ranks (eq. 3); mse on normalised ranks; ordinal classification of their deciles (eqs. 17-20);
    score, regression of standardised teacher scores; listwise, softmax cross-entropy on the top of the ranking"""
    target: Literal["rank", "score"] = "rank"
    """listwise only: teacher's relevance from ranks (normal quantiles) or from standardised scores"""
    temperature: float = 0.5
    """listwise only: temperature of the target; mass lies around 1/temperature deviations above the mean"""
    sampling: Literal["pairs", "blocks"] = "pairs"
    """i.i.d. pairs as in the paper, or blocks of queries x images that use every labelled pair among them"""
    outlier_prob: float = field(default=0.1, metadata={"also": "prob_outlier"})
    """share of pairs with an image outside the candidates"""
    random_subset_size: int = 0
    """candidates per query, drawn at random from the ranked ones and ranked among themselves; 0 takes all"""
    subset: Literal["resampled", "fixed"] = "resampled"
    """with --random_subset_size: drawn anew in every step (the paper's text), or once per query (its released code)"""
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
    ema: float = 0.0
    """decay of an exponential moving average of the weights, which is then what is validated and kept; 0 for none"""
    schedule: Literal["constant", "cosine"] = "constant"
    """learning rate over the run; cosine ends at zero"""
    val_every: int = 1
    """epochs between validations"""
    patience: int = 0
    """stop after this many validations without a better mAP(L); 0 never stops early"""
    seed: int = field(default=0, metadata={"also": "random_seed"})
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
        for name in ("weight_decay", "patience", "seed", "random_subset_size"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name}: expected zero or more, found {getattr(self, name)}")
        if not 0 <= self.outlier_prob < 1:
            raise ValueError(f"--outlier_prob: expected a probability below 1, found {self.outlier_prob}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"--ema: expected a decay below 1, found {self.ema}")
        if self.loss == "listwise" and self.sampling == "pairs":
            raise ValueError(
                "--loss listwise: expected --sampling blocks (it compares images of one query), found pairs"
            )

    def architecture(self, in_dim: int) -> RankerConfig:
        """The ranker's configuration for `in_dim`-dimensional features."""
        sizes = tuple(self.hidden_sizes), self.out_feat_dim
        heads = HEADS.get(self.loss, 1)
        return RankerConfig(in_dim, *sizes, self.input_norm, self.dropout, self.residual, heads)

    @property
    def relevance(self) -> str:
        """What the teacher's relevance is made of: see `fastgda.candidates.relevance_table`."""
        return "score" if self.loss == "score" else self.target


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
        epochs=20,
        schedule="cosine",
        val_every=5,
    ),
}
"""Named defaults of train.py; every flag overrides them."""
