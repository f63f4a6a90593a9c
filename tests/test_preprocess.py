"""Preprocessing equals the libraries' own transforms, picture by picture."""

from __future__ import annotations

import open_clip
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision import transforms

from feature_extraction import clip, vit
from feature_extraction.preprocess import in_micro_batches

SIZES = [(300, 200), (201, 333), (224, 224), (256, 256), (37, 61), (640, 427), (225, 1200)]


def noise(size: tuple[int, int]) -> Image.Image:
    """A picture of random pixels: every shift or other filter shows."""
    width, height = size
    pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Image.fromarray(pixels.numpy())


@pytest.mark.parametrize("size", SIZES)
def test_dino_pictures_are_prepared_as_in_its_evaluation(size) -> None:
    picture = noise(size)
    original = transforms.Compose(
        [
            transforms.Resize(256, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    timm_transform = create_transform((3, 224, 224), interpolation="bicubic", crop_pct=0.875)
    found = vit.DINO.preprocess([picture])[0]
    assert torch.allclose(found, original(picture), rtol=0, atol=1e-6)
    assert torch.allclose(found, timm_transform(picture), rtol=0, atol=1e-6)
    assert torch.equal(vit.DINOV2.preprocess([picture])[0], found)


@pytest.mark.parametrize("size", SIZES)
def test_clip_pictures_are_prepared_as_open_clip_does(size) -> None:
    picture = noise(size)
    original = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(), is_train=False)
    assert torch.allclose(clip.PREPROCESS([picture])[0], original(picture), rtol=0, atol=1e-6)


def test_a_strip_is_cut_before_it_is_resized() -> None:
    strip = Image.new("RGB", (500_000, 2), "white")
    strip.paste("red", (250_000 - 8, 0, 250_000 + 8, 2))
    batch = clip.PREPROCESS([strip, strip.rotate(90, expand=True)])
    red = (torch.tensor([1.0, 0, 0]) - torch.tensor(clip.PREPROCESS.mean)) / torch.tensor(clip.PREPROCESS.std)
    assert batch.shape == (2, 3, 224, 224)
    assert torch.allclose(batch, red.view(1, 3, 1, 1).expand(2, 3, 224, 224), atol=1e-6)


def test_convolutions_are_not_rounded_to_tf32() -> None:
    seen = []

    def forward(batch: list[Image.Image]) -> torch.Tensor:
        seen.append(torch.backends.cudnn.allow_tf32)
        return torch.zeros(len(batch), 3)

    before = torch.backends.cudnn.allow_tf32
    assert in_micro_batches([noise((4, 4))] * 9, 3, torch.device("cpu"), forward).shape == (9, 3)
    assert seen == [False, False] and torch.backends.cudnn.allow_tf32 == before
