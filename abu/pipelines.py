"""Source models from a pipeline that diffusers saved: a folder, or its name on the hub.

    source = load_pipeline("stable-diffusion-v1-4", device)      # any with a U-Net or transformer conditioned on text

The parametrisation and the noise levels are read from the scheduler's configuration; the text key/value projections
are found by running the denoiser on random inputs (`abu.text_layers`). Nothing but diffusers' own classes is built.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from abu.coco import load_coco
from abu.conditioning import Conditioning, TextDenoiser, pack_text
from abu.diffusion_loss import NoiseSchedule
from abu.layers import declare_key_values
from abu.models import load_source
from abu.source import Source
from abu.text_layers import Probe, find_text_layers
from fastgda.core import keyed_generator, sha256_file

DENOISERS = ("unet", "transformer")
WIDTHS = ("joint_attention_dim", "caption_channels", "encoder_hid_dim", "cross_attention_dim")
"""Where a denoiser's configuration says how wide its token states are; the first that is set counts."""
ENCODERS = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
FLOW_TIMES: dict[str, float | str] = {
    "SD3Transformer2DModel": 1.0,
    "SanaTransformer2DModel": "timestep_scale",
    "AuraFlowTransformer2DModel": 1e-3,
    "UNet2DConditionModel": 1.0,
}
"""What a flow-matching denoiser is told, as a multiple of 1000 σ or the name of its setting: no scheduler says it."""
PROBE_TOKENS, PROBE_SIDE = 7, 16
INDEX = "model_index.json"


@dataclass(frozen=True)
class PipelineSource:
    """The denoiser of a pipeline and what its scheduler says."""

    denoiser: nn.Module
    schedule: NoiseSchedule
    latent_shape: tuple[int, int, int]
    """(c, h, w) that the denoiser was made for."""

    @property
    def device(self) -> torch.device:
        """Where the denoiser's weights are."""
        return next(self.denoiser.parameters()).device


def open_source(path: str | Path, device: torch.device) -> Source:
    """The source model at `path`: COCO's `model.bin`, a folder of `abu.models.save_source`, or a pipeline."""
    place = Path(path)
    if place.suffix in (".bin", ".pt", ".pth", ".safetensors"):
        return load_coco(place, device)
    if (place / "denoiser.safetensors").is_file():
        return load_source(place, device)
    return load_pipeline(path, device)


def source_hashes(path: str | Path, parts: tuple[str, ...] = (*DENOISERS, "scheduler")) -> dict[str, str]:
    """What a manifest records of a source model: hashes of the files of `parts`, or on the hub its name."""
    place = Path(path)
    if place.is_file():
        return {place.name: sha256_file(place)}
    files = [file for part in parts for file in sorted(place.glob(f"{part}/*")) if file.is_file()]
    files += [file for file in [place / "denoiser.safetensors"] if file.is_file()]
    hashes = {file.relative_to(place).as_posix(): sha256_file(file) for file in files}
    return hashes or {"source": str(path)}


def load_pipeline(path: str | Path, device: torch.device) -> PipelineSource:
    """The denoiser in float32 and evaluation mode, frozen, its text key/value projections declared.

    Raises `ValueError` naming what is missing, does not fit, or is conditioned on more than text.
    """
    index = read_index(path)
    part = next((name for name in DENOISERS if name in index), None)
    if part is None or "scheduler" not in index:
        raise ValueError(f"{path}: expected a pipeline with a scheduler and a unet or transformer, found {[*index]}")
    scheduler = _load(path, "scheduler", index["scheduler"])
    model, info = _load(path, part, index[part], output_loading_info=True, dtype=torch.float32)
    if unfit := [f"{kind} {info[kind][0]}" for kind in ("missing_keys", "unexpected_keys") if info.get(kind)]:
        raise ValueError(f"{path}/{part}: expected the weights of {type(model).__name__}, found {', '.join(unfit)}")
    model.to(device).eval().requires_grad_(False)
    schedule, times = schedule_of(scheduler)
    times = None if times is None else times * flow_scale(type(model).__name__, model.config)
    conditioning = Conditioning.of(model, model.config)
    inwards, outwards = model.config["in_channels"], model.config.get("out_channels") or model.config["in_channels"]
    if outwards < inwards:
        raise ValueError(f"{path}/{part}: expected a denoiser of {outwards} channels, found one that reads {inwards}")
    plain = conditioning == Conditioning("sample") and times is None and outwards == inwards
    denoiser = model if plain else TextDenoiser(model, conditioning, times).to(device).eval()
    shape = latent_shape(model.config)
    inputs = probe(conditioning, model.config, shape, len(schedule) // 2, device)
    declare_key_values(denoiser, find_text_layers(denoiser, inputs))
    return PipelineSource(denoiser, schedule, shape)


def read_index(path: str | Path) -> dict[str, tuple[str, str]]:
    """Part of the pipeline -> (library, class), without those that are empty; `ValueError` if it is no pipeline."""
    try:
        config = DiffusionPipeline.load_config(str(path))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}: expected a folder with {INDEX}, or a pipeline's name on the hub ({error})"
        ) from error
    parts = {name: value for name, value in config.items() if isinstance(value, list) and len(value) == 2}
    return {name: (library, kind) for name, (library, kind) in parts.items() if library}


def _load(path: str | Path, part: str, kind: tuple[str, str], **options: Any) -> Any:
    """One part, by diffusers' own `from_pretrained`; `ValueError` naming it."""
    library, name = kind
    loaded = getattr(diffusers, name, None) if library == "diffusers" else None
    if loaded is None:
        raise ValueError(f"{path}/{part}: expected a class of diffusers, found {name} of {library}")
    try:
        return loaded.from_pretrained(str(path), subfolder=part, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}/{part}: expected a {name} as diffusers saves it, found: {error}") from error


def schedule_of(scheduler: Any) -> tuple[NoiseSchedule, Tensor | None]:
    """(noise levels and target, what the model is told for each timestep if not its number) of a scheduler.

    Flow matching's σ are those of the scheduler's configuration, its shift included, from low to high; a draw that is
    uniform over them has the density that the shift gives.
    """
    config = scheduler.config
    prediction = config.get("prediction_type", "epsilon")
    if prediction == "flow_prediction" or config.get("use_flow_sigmas"):
        scheduler = FlowMatchEulerDiscreteScheduler(config["num_train_timesteps"], shift=config.get("flow_shift", 1.0))
    elif hasattr(scheduler, "alphas_cumprod"):
        return NoiseSchedule(scheduler.alphas_cumprod, prediction), None
    elif not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        raise ValueError(
            f"{type(scheduler).__name__}: expected a scheduler of epsilon, v-prediction or flow matching, found another"
        )
    return NoiseSchedule(scheduler.sigmas.flip(0), "flow"), scheduler.timesteps.flip(0)


def flow_scale(name: str, config: Any) -> float:
    """What a flow-matching denoiser's timestep is, in units of 1000 σ; `ValueError` if that is not known."""
    if name not in FLOW_TIMES:
        raise ValueError(f"{name}: expected flow matching with one of {', '.join(FLOW_TIMES)}, found another denoiser")
    scale = FLOW_TIMES[name]
    return float(config[scale]) if isinstance(scale, str) else scale


def latent_shape(config: Any) -> tuple[int, int, int]:
    """(c, h, w) of a denoiser's configuration."""
    size = config.get("sample_size")
    if size is None:
        raise ValueError(f"{config.get('_class_name')}: expected a configuration with sample_size, found none")
    height, width = (size, size) if isinstance(size, int) else size
    return config["in_channels"], height, width


def text_width(config: Any) -> int:
    """d of the token states that a denoiser reads."""
    found = next((config[name] for name in WIDTHS if config.get(name)), None)
    if not isinstance(found, int):
        raise ValueError(
            f"{config.get('_class_name')}: expected one width of token states under {', '.join(WIDTHS)}, found {found}"
        )
    return found


def denoiser_inputs(denoiser: nn.Module) -> tuple[tuple[int, int, int], int]:
    """((c, h, w) of the latents, width of the token states) that a source's denoiser reads."""
    config = (denoiser.model if isinstance(denoiser, TextDenoiser) else denoiser).config
    return latent_shape(config), text_width(config)


def probe(
    conditioning: Conditioning, config: Any, shape: tuple[int, int, int], timestep: int, device: torch.device
) -> Probe:
    """Random inputs that a denoiser takes; of small latents, for every Linear's input is kept while it is watched."""
    width, generator = text_width(config), keyed_generator("probe")
    size = shape[0], *(min(side, PROBE_SIDE) for side in shape[1:])

    def random(*sizes: int) -> Tensor:
        return torch.randn(1, *sizes, generator=generator).to(device)

    def text(tokens: int) -> Tensor:
        return pack_text(random(tokens, width), random(conditioning.pooled) if conditioning.pooled else None)

    first, second, longer = text(PROBE_TOKENS), text(PROBE_TOKENS), text(PROBE_TOKENS + 1)
    timesteps = torch.tensor([timestep], device=device)
    return Probe((random(*size), random(*size)), timesteps, (first, second), longer, first.shape[1] - PROBE_TOKENS)


class PipelineEncoder:
    """A pipeline's own autoencoder and text encoders: what its denoiser reads, from pictures and captions."""

    def __init__(self, path: str | Path, device: torch.device) -> None:
        """Raises `ValueError` naming the part that is missing or damaged."""
        index = read_index(path)
        if missing := [part for part in ("vae", "text_encoder", "tokenizer") if part not in index]:
            raise ValueError(f"{path}: expected a pipeline with a {missing[0]}, found {', '.join(index)}")
        # Where one of several text encoders is left out, the pipeline asks its denoiser for the width.
        whole = "text_encoder_2" in index and "text_encoder_3" not in index and "transformer" in index
        left_out = dict.fromkeys(set(index) - {*ENCODERS, "scheduler", *(DENOISERS if whole else ())})
        try:
            self.pipeline = DiffusionPipeline.from_pretrained(str(path), dtype=torch.float32, **left_out)
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path}: expected a whole pipeline as diffusers saves it, found: {error}") from error
        self.pipeline.to(device)
        self.device = device

    @torch.inference_mode()
    def latents(self, images: Tensor, noise: Callable[[int, tuple[int, ...]], Tensor]) -> Tensor:
        """(z − shift) · scale [B, c, h, w] with z drawn from the posterior of `images` [B, 3, P, P] in [-1, 1].

        `noise(i, shape)` is the standard normal noise of the i-th image.
        """
        vae = self.pipeline.vae
        posterior = vae.encode(images.to(self.device)).latent_dist
        normal = torch.stack([noise(index, tuple(posterior.mean.shape[1:])) for index in range(len(images))])
        drawn = posterior.mean + posterior.std * normal.to(posterior.mean)
        shift = vae.config.get("shift_factor") or 0.0
        return (drawn - shift) * vae.config["scaling_factor"]

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels [B, 3, P, P] in [-1, 1] of `latents` [B, c, h, w], the other way round."""
        vae = self.pipeline.vae
        raw = latents.to(self.device, torch.float32) / vae.config["scaling_factor"]
        return vae.decode(raw + (vae.config.get("shift_factor") or 0.0)).sample.clamp(-1, 1)

    @torch.inference_mode()
    def text(self, captions: Sequence[str], pixels: int) -> Tensor:
        """Packed text [B, T, d] (see `abu.conditioning`) of captions, for pictures of `pixels`; padding that the
        pipeline masks is zero."""
        wanted: dict[str, Any] = {"prompt_2": None, "prompt_3": None, "device": self.device, "num_images_per_prompt": 1}
        wanted |= {"do_classifier_free_guidance": False, "prompt": list(captions)}
        accepted = inspect.signature(self.pipeline.encode_prompt).parameters
        tokens, mask, *rest = self.pipeline.encode_prompt(**{k: v for k, v in wanted.items() if k in accepted})
        if mask is not None:
            return tokens * mask[..., None].to(tokens)
        pooled = rest[0] if rest else None
        if pooled is not None and hasattr(self.pipeline, "_get_add_time_ids"):
            size_and_crop = pooled.new_tensor([pixels, pixels, 0, 0, pixels, pixels])
            pooled = torch.cat([pooled, size_and_crop.expand(len(pooled), -1)], dim=-1)
        return pack_text(tokens, pooled)
