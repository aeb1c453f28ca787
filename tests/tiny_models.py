"""A tiny random model of any family of transformers, and inputs that it runs with.

Configurations are made small by the names of their fields, their parts too; :data:`PARTICULAR` has what some families want
besides.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_SIZES = {
    64: """hidden_size d_model n_embd embed_dim dim width encoder_dim projection_dim out_hidden_size embedding_size inner_dim
        decoder_hidden_size output_dim intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner mlp_dim
        dim_feedforward d_ff ffn_hidden_size hidden_dim expert_ffn_hidden_size max_target_positions max_source_positions""",
    32: "moe_intermediate_size shared_expert_intermediate_size q_lora_rank kv_lora_rank image_size",
    16: """head_dim attention_head_dim kv_channels d_kv query_pre_attn_scalar v_head_dim qk_rope_head_dim qk_nope_head_dim
        global_head_dim hidden_size_per_layer_input""",
    8: "patch_size",
    6: "sliding_window",
    4: """num_attention_heads n_head num_heads n_heads encoder_attention_heads decoder_attention_heads num_experts
        num_local_experts n_routed_experts moe_num_experts""",
    2: """num_key_value_heads num_kv_heads num_global_key_value_heads num_hidden_layers n_layer num_layers n_layers
        encoder_layers decoder_layers num_decoder_layers num_encoder_layers depth num_experts_per_tok
        num_experts_per_token moe_k""",
    1: "n_group topk_group n_shared_experts first_k_dense_replace",
    128: "vocab_size vocab_size_per_layer_input shape_vocab_size pronunciation_vocab_size",
    256: "max_position_embeddings n_positions n_ctx max_seq_len",
}
SMALL = {name: size for size, names in _SIZES.items() for name in names.split()}
"""What is made this small where a configuration has it and it is larger."""

FILLED = {"head_dim": 16, "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}
"""What is given where the default is None."""

TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

KV_HEADS = ("num_key_value_heads", "num_kv_heads", "num_global_key_value_heads")

_MROPE = dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 3, 3])
_HALF_MROPE = {**_MROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
_LINEAR_AND_FULL = dict(num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])

PARTICULAR: dict[str, dict[str, Any]] = {
    **{f"{name}_text": dict(rope_parameters=_MROPE) for name in ("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni", "paddleocr_vl")},
    **{f"{name}_text": dict(rope_parameters=_HALF_MROPE) for name in ("glm4v", "glm4v_moe", "glm_ocr", "glm_image")},
    "bailing_hybrid": _LINEAR_AND_FULL,
    "kimi_linear": dict(linear_num_heads=4, linear_head_dim=16, **_LINEAR_AND_FULL),
    "bamba": dict(attn_layer_indices=[1], mamba_n_heads=4, mamba_d_state=16),
    "chameleon": dict(vocabulary_map={"<image>": 120}),
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, rope_theta=10000.0, clip_qkv=8.0),
        ffn_config=dict(ffn_hidden_size=64, moe_num_experts=4, moe_top_k=2),
    ),
    "emu3": dict(pad_token_id=0, vocabulary_map={"<image>": 120, "<|extra_200|>": 121}),
    "esm": dict(vocab_size=33),
    "falcon_h1": dict(mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16),
    "gemma3n_text": dict(
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        activation_sparsity_pattern=[0.0] * 4,
    ),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"], mamba_n_heads=4, mamba_d_state=16),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "mistral4": dict(head_dim=32),
    "recurrent_gemma": dict(num_hidden_layers=3),
    "sam2_hiera_det_model": dict(hidden_size=96, image_size=128),
    "sam3_lite_text_text_model": dict(num_hidden_layers=3),
    "vjepa2": dict(crop_size=32, frames_per_clip=4),
    "yolos": dict(image_size=[32, 48]),
    "zamba2": dict(layers_block_type=["mamba", "hybrid"]),
    "xmod": dict(default_language="en_XX"),
}
"""What a family, or a part of one, wants besides: by model type."""

LENGTH, DECODER_LENGTH = 12, 5
"""Tokens of a prompt, and of a decoder beside an encoder."""

_MAX_PARAMETERS = 40_000_000


def family_names() -> dict[str, list[str]]:
    """The names of each family's model classes, those that generate first."""
    mappings = [name for name in vars(modeling_auto) if name.startswith("MODEL_") and name.endswith("MAPPING_NAMES")]
    generating = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SPEECH_SEQ_2_SEQ", "SEQ_TO_SEQ", "MODEL_MAPPING")
    mappings.sort(key=lambda name: next((i for i, part in enumerate(generating) if part in name), len(generating)))
    names: dict[str, list[str]] = {}
    for mapping in mappings:
        for family, found in getattr(modeling_auto, mapping).items():
            names.setdefault(family, []).extend([found] if isinstance(found, str) else found)
    return {family: list(dict.fromkeys(found)) for family, found in sorted(names.items())}


def classes_of(names: list[str]) -> list[Any]:
    """Those model classes of these names that can be imported here and attend."""
    found = [getattr(transformers, name, None) for name in names]
    return [model_class for model_class in found if hasattr(model_class, "_supports_flash_attn")]


class NotBuilt(Exception):
    """No tiny model of this family can be made here; says why."""


class Sample(NamedTuple):
    """A family's configuration, small, and inputs that eager attention runs with it."""

    config: Any
    inputs: dict[str, Tensor]


def sample(family: str, model_class: Any) -> Sample:
    """The first small configuration and the first inputs that go together.

    Raises:
        NotBuilt: none of those tried do.
    """
    problem: Exception | None = None
    for grouped, kinds in ((True, True), (True, False), (False, True), (False, False)):
        try:
            config = _tiny(CONFIG_MAPPING[family], CONFIG_MAPPING[family](), grouped, kinds)
            with torch.device("meta"):
                size = sum(weights.numel() for weights in model_class._from_config(copy.deepcopy(config)).parameters())
            if size > _MAX_PARAMETERS:
                raise NotBuilt(f"{size // 10**6} million parameters at the least")
            model = build(model_class, config, "eager")
        except Exception as error:
            problem = problem or error
            continue
        for make_inputs in _inputs(model):
            try:
                inputs = make_inputs()
                with torch.no_grad():
                    model(**inputs)
                return Sample(config, inputs)
            except Exception as error:
                problem = problem or error
    raise NotBuilt(first_line(problem or NotBuilt("takes none of the inputs tried")))


def build(model_class: Any, config: Any, implementation: str) -> Any:
    """A model with random weights, the same each time, large enough for attention to decide what comes out."""
    torch.manual_seed(0)
    model = model_class._from_config(copy.deepcopy(config), attn_implementation=implementation, dtype=torch.float32).eval()
    _randomize(model)
    return model


def _tiny(config_class: Any, default: Any, grouped: bool, kinds: bool) -> Any:
    """A configuration made small, its parts too. ``grouped``: with fewer KV heads than heads, where that is asked.
    ``kinds``: one layer of each kind."""
    given = {key: value for key, value in vars(default).items() if not key.startswith("_")}
    options: dict[str, Any] = {}
    for name, value in given.items():
        if name in SMALL and isinstance(value, int) and not isinstance(value, bool):
            options[name] = min(SMALL[name], value)
        elif name in TOKENS and isinstance(value, (int, list)):
            options[name] = TOKENS[name]
        elif name in FILLED and value is None:
            options[name] = FILLED[name]
        elif isinstance(value, dict) and "mrope_section" in value:
            options[name] = {**value, "mrope_section": _sections(value["mrope_section"])}
    if not grouped:
        heads = next((options[name] for name in ("num_attention_heads", "n_head", "num_heads") if name in options), None)
        options.update({name: heads for name in KV_HEADS if name in options and heads})
    for name in config_class.sub_configs or {}:
        part = getattr(default, name, None)
        if part is not None:
            options[name] = _tiny(type(part), part, grouped, kinds)
    layer_types = list(dict.fromkeys(given.get("layer_types") or ()))
    if kinds and layer_types:
        options["layer_types"] = layer_types if len(layer_types) > 1 else layer_types * 2
        options.update({name: len(options["layer_types"]) for name in ("num_hidden_layers", "n_layer") if name in options})
    return config_class(**{**options, **PARTICULAR.get(config_class.model_type, {})})


def _sections(sections: list[int]) -> list[int]:
    """Sections of a multimodal rotary embedding, shrunk to heads of 16."""
    small = [max(1, section * 8 // sum(sections)) for section in sections]
    return [8 - sum(small[1:]), *small[1:]]


def _randomize(model: torch.nn.Module) -> None:
    """Weights that matter: nothing is left at zero, gates and layer scales neither."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weights in model.parameters():
            noise = torch.randn(weights.shape, generator=generator)
            if weights.dim() > 1:
                weights.copy_(noise * 1.5 / (weights[0].numel() or 1) ** 0.5)
            else:
                weights.add_(0.1 * noise)


def _inputs(model: Any) -> Iterator[Callable[[], dict[str, Tensor]]]:
    """What the model's forward may take: text if it can, an image or sound, or both."""
    takes = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(0)
    parts = [model.config]
    for part in parts:
        parts.extend(getattr(part, name) for name in part.sub_configs or {} if getattr(part, name, None) is not None)

    def setting(*names: str, default: Any) -> Any:
        return next((value for part in parts for name in names if (value := getattr(part, name, None))), default)

    def first(*names: str, default: int) -> int:
        value = setting(*names, default=default)
        return value if isinstance(value, int) else value[0]

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def ids(length: int, *names: str) -> Tensor:
        return torch.randint(3, setting(*names, default=128) - 1, (2, length), generator=generator)

    def image(*before: int) -> Tensor:
        size = setting("image_size", default=32)
        sides = (size, size) if isinstance(size, int) else size
        return random(2, *before, first("num_channels", "in_channels", "in_chans", default=3), *sides)

    def video() -> Tensor:
        return image(first("num_frames", "frames_per_clip", "tubelet_size", default=4))

    def patches() -> Tensor:
        channels = first("num_channels", "in_channels", "in_chans", default=3)
        return random(48, channels * first("temporal_patch_size", default=1) * first("patch_size", default=8) ** 2)

    bins = setting("num_mel_bins", "feature_size", "mel_bins", default=80)

    def mel() -> Tensor:
        return random(2, bins, 2 * setting("max_source_positions", default=50))

    def series() -> Tensor:
        return random(2, setting("context_length", default=32), setting("num_input_channels", default=1))

    prompt = partial(ids, LENGTH, "vocab_size")
    layouts: list[dict[str, Callable[[], Tensor]]] = [
        dict(input_ids=prompt),
        dict(pixel_values=image),
        dict(input_ids=prompt, pixel_values=image),
        dict(input_ids=prompt, pixel_values=image, qformer_input_ids=prompt),
        dict(pixel_values=video),
        dict(input_features=mel),
        dict(input_features=lambda: mel().transpose(1, 2)),
        dict(input_values=lambda: random(2, 4000)),
        dict(input_values=lambda: random(2, 1, 4000)),
        dict(input_values=lambda: random(2, first("max_length", default=100), bins)),
        dict(pixel_values_videos=video),
        dict(input_ids=prompt, pixel_values=video),
        dict(input_ids=prompt, pixel_values_videos=video),
        dict(inputs_embeds=lambda: random(2, LENGTH, setting("hidden_size", default=64))),
        dict(hidden_states=patches, grid_thw=lambda: torch.tensor([[1, 4, 4], [1, 4, 8]])),
        dict(pixel_values=patches, grid_thw=lambda: torch.tensor([[1, 4, 4], [1, 4, 8]])),
        dict(past_values=series),
    ]
    decoder: dict[str, Callable[[], Tensor]] = {}
    if "decoder_input_ids" in takes:
        decoder["decoder_input_ids"] = partial(ids, DECODER_LENGTH, "vocab_size", "decoder_vocab_size")
    for layout in layouts:
        if layout.keys() <= takes.keys():
            yield lambda layout=layout: {name: make() for name, make in (layout | decoder).items()}


def first_line(error: Exception) -> str:
    """An error in short."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:200]
