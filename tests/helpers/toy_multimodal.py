"""Models that read images or sound beside text, small enough to be made and run in a second, with random weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from kvmix_compile.models_zoo.seeding import seeded

VOCABULARY, IMAGE = 120, 100  # a token that stands for a piece of an image
START_OF_IMAGE, END_OF_IMAGE, VIDEO = 101, 102, 103
SIDE, PATCH = 16, 4

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
# Of the vision towers of the Qwens.
QWEN_VISION = {
    "depth": 2,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START_OF_IMAGE,
    "vision_end_token_id": END_OF_IMAGE,
}
THREE_ROWS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


@dataclass(frozen=True)
class Family:
    """One family: the class of its model, its configuration, and what its processor would give for the prompt.

    tokens: how many tokens an image or a piece of sound takes. more: what goes with two prompts beside token ids.
    """

    model: str
    config: Callable[[], Any]
    tokens: int
    more: Callable[[Tensor], dict[str, Tensor]]
    placeholder: int = IMAGE

    def toy(self, seed: int = 0) -> nn.Module:
        """A random float32 model in evaluation mode."""
        with seeded(seed):
            model = getattr(transformers, self.model)(self.config())
            _randomize(model)
        return model.eval()

    def prompt(self, rows: int = 1, before: int = 3, after: int = 9, seed: int = 0) -> dict[str, Tensor]:
        """What a processor gives for a text with one image, or sound, in each row."""
        with seeded(seed):
            text = torch.randint(3, IMAGE, (rows, before + after))
            held = torch.full((rows, self.tokens), self.placeholder)
            ids = torch.cat([text[:, :before], held, text[:, before:]], dim=1)
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **self.more(ids)}


def _pixels(ids: Tensor) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(len(ids), 3, SIDE, SIDE)}


def _many_pixels(ids: Tensor) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(len(ids), 1, 3, SIDE, SIDE)}


def _tiles(ids: Tensor) -> dict[str, Tensor]:
    sizes = torch.full((len(ids), 2), SIDE)
    return {"pixel_values": torch.randn(len(ids), 2, 3, SIDE, SIDE), "image_sizes": sizes}


def _sized_pixels(ids: Tensor) -> dict[str, Tensor]:
    return _pixels(ids) | {"image_sizes": torch.full((len(ids), 2), SIDE)}


def _typed_pixels(ids: Tensor) -> dict[str, Tensor]:
    return _pixels(ids) | {"token_type_ids": (ids == IMAGE).to(torch.int64)}


def _prefix_pixels(ids: Tensor) -> dict[str, Tensor]:
    return _pixels(ids) | {"token_type_ids": torch.zeros_like(ids)}


def _patches(ids: Tensor) -> dict[str, Tensor]:
    side = SIDE // PATCH
    return {
        "pixel_values": torch.randn(len(ids) * side * side, 3 * 2 * PATCH * PATCH),
        "image_grid_thw": torch.tensor([[1, side, side]]).expand(len(ids), -1).contiguous(),
        "mm_token_type_ids": (ids == IMAGE).to(torch.int64),
    }


def _sound(ids: Tensor) -> dict[str, Tensor]:
    frames = 32
    return {
        "input_features": torch.randn(len(ids), 8, frames),
        "feature_attention_mask": torch.ones(len(ids), frames, dtype=torch.int64),
    }


def _text(kind: str, **changed: Any) -> Any:
    return getattr(transformers, kind)(**TEXT | changed)


def _of_clip(kind: str, **changed: Any) -> Any:
    vision = transformers.CLIPVisionConfig(**VISION)
    return getattr(transformers, kind)(
        vision_config=vision,
        text_config=_text("LlamaConfig"),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        **changed,
    )


def _of_siglip(kind: str, text: Any, **changed: Any) -> Any:
    vision = transformers.SiglipVisionConfig(**VISION, vision_use_head=False)
    return getattr(transformers, kind)(vision_config=vision, text_config=text, image_token_index=IMAGE, **changed)


def _idefics3() -> Any:
    return transformers.Idefics3Config(
        vision_config={**VISION, "model_type": "idefics3_vision"},
        text_config=_text("LlamaConfig"),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
    )


def _of_qwen(kind: str, text: Mapping[str, Any] | None = None, **vision: Any) -> Any:
    text = TEXT | {"rope_parameters": THREE_ROWS} | dict(text or {})
    config = getattr(transformers, f"{kind}Config")
    return config(vision_config=QWEN_VISION | vision, text_config=text, **QWEN_TOKENS)


def _internvl() -> Any:
    vision = {**VISION, "image_size": (SIDE, SIDE), "patch_size": (PATCH, PATCH)}
    return transformers.InternVLConfig(
        vision_config=vision, text_config=_text("Qwen2Config"), image_token_id=IMAGE, image_seq_length=4
    )


def _mistral3() -> Any:
    vision = transformers.PixtralVisionConfig(**VISION, head_dim=8)
    return transformers.Mistral3Config(
        vision_config=vision, text_config=_text("MistralConfig", sliding_window=None), image_token_index=IMAGE
    )


def _gemma3() -> Any:
    text = _text("Gemma3TextConfig", sliding_window=64, query_pre_attn_scalar=8,
                 layer_types=["sliding_attention", "full_attention"])  # fmt: skip
    return _of_siglip("Gemma3Config", text, mm_tokens_per_image=4, boi_token_index=START_OF_IMAGE,
                      eoi_token_index=END_OF_IMAGE)  # fmt: skip


def _paligemma() -> Any:
    return _of_siglip("PaliGemmaConfig", _text("GemmaConfig"), projection_dim=32, hidden_size=32)


AUDIO = {
    "num_mel_bins": 8,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "d_model": 16,
    "max_source_positions": 16,
}


def _qwen2_audio() -> Any:
    return transformers.Qwen2AudioConfig(audio_config={**AUDIO, "model_type": "qwen2_audio_encoder"},
                                         text_config=_text("Qwen2Config"), audio_token_index=IMAGE)  # fmt: skip


PATCHES = (SIDE // PATCH) ** 2

FAMILIES: Mapping[str, Family] = {
    "llava": Family("LlavaForConditionalGeneration", lambda: _of_clip("LlavaConfig"), PATCHES, _pixels),
    "llava_next": Family(
        "LlavaNextForConditionalGeneration",
        lambda: _of_clip("LlavaNextConfig", image_grid_pinpoints=[[SIDE, SIDE]]),
        2 * PATCHES + 4, _tiles,
    ),
    "mistral3": Family("Mistral3ForConditionalGeneration", _mistral3, 4, _sized_pixels),
    "internvl": Family("InternVLForConditionalGeneration", _internvl, 4, _pixels),
    "idefics3": Family("Idefics3ForConditionalGeneration", _idefics3, 4, _many_pixels),
    "gemma3": Family("Gemma3ForConditionalGeneration", _gemma3, 4, _typed_pixels),
    "paligemma": Family("PaliGemmaForConditionalGeneration", _paligemma, PATCHES, _prefix_pixels),
    "qwen2_5_vl": Family(
        "Qwen2_5_VLForConditionalGeneration",
        lambda: _of_qwen("Qwen2_5_VL", hidden_size=16, out_hidden_size=32, window_size=8,
                         fullatt_block_indexes=[1]), 4, _patches,
    ),
    "qwen3_vl": Family(
        "Qwen3VLForConditionalGeneration",
        lambda: _of_qwen("Qwen3VL", {"rope_parameters": THREE_ROWS | {"mrope_interleaved": True}}, hidden_size=16,
                         out_hidden_size=32, num_position_embeddings=16, deepstack_visual_indexes=[0, 1]),
        4, _patches,
    ),
    "qwen2_audio": Family("Qwen2AudioForConditionalGeneration", _qwen2_audio, 8, _sound),
}  # fmt: skip


@torch.no_grad()
def _randomize(model: nn.Module) -> None:
    """Weights that let attention be far from uniform: transformers' own are so small that it would not matter."""
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.normal_(0.0, 1.5 * parameter[0].numel() ** -0.5)
