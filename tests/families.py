"""Every model family of transformers as a tiny random model, and how it fares on "pagedflash" beside eager attention.

``python tests/families.py`` prints the table of docs/transformers.md, ``python tests/families.py llama bart`` how those two
fare.
"""

from __future__ import annotations

import copy
import inspect
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import pagedflash
import pagedflash.transformers

SMALL = {
    # sizes
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "width", "encoder_dim", "projection_dim"), 64),
    **dict.fromkeys(("out_hidden_size", "embedding_size", "inner_dim", "decoder_hidden_size", "output_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner", "mlp_dim"), 64),
    **dict.fromkeys(("dim_feedforward", "d_ff", "ffn_hidden_size", "hidden_dim", "expert_ffn_hidden_size"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank", "kv_lora_rank"), 32),
    **dict.fromkeys(("head_dim", "attention_head_dim", "kv_channels", "d_kv", "query_pre_attn_scalar", "v_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "global_head_dim"), 16),
    # numbers of things
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads",), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "num_global_key_value_heads"), 2),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers", "depth"), 2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    # lengths
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "shape_vocab_size", "pronunciation_vocab_size"), 128),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 256),
    **dict.fromkeys(("max_target_positions", "max_source_positions"), 64),
    "sliding_window": 6,
    "image_size": 32,
    "patch_size": 8,
    "hidden_size_per_layer_input": 16,
}
"""What is made this small where a configuration has it and it is larger."""

FILLED = {"head_dim": 16, "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}
"""What is given where the default is None."""

MROPE = dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 3, 3]))
HALF_MROPE = dict(rope_parameters={**MROPE["rope_parameters"], "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5})
LINEAR_AND_FULL = dict(num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])

PARTICULAR: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text", "paddleocr_vl_text"), MROPE),
    **dict.fromkeys(("glm4v_text", "glm4v_moe_text", "glm_ocr_text", "glm_image_text"), HALF_MROPE),
    **dict.fromkeys(("bailing_hybrid", "kimi_linear"), LINEAR_AND_FULL),
    "bamba": dict(attn_layer_indices=[1]),
    "chameleon": dict(vocabulary_map={"<image>": 120}),
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, rope_theta=10000.0, clip_qkv=8.0),
        ffn_config=dict(ffn_hidden_size=64, moe_num_experts=4, moe_top_k=2),
    ),
    "emu3": dict(pad_token_id=0, vocabulary_map={"<image>": 120, "<|extra_200|>": 121}),
    "esm": dict(vocab_size=33),
    "gemma3n_text": dict(
        num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=2,
        activation_sparsity_pattern=[0.0] * 4,
    ),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"]),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "mistral4": dict(head_dim=32),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "recurrent_gemma": dict(num_hidden_layers=3),
    "sam3_lite_text_text_model": dict(num_hidden_layers=3),
    "zamba2": dict(layers_block_type=["mamba", "hybrid"]),
    "xmod": dict(default_language="en_XX"),
}  # fmt: skip
"""What a family (or a part of one) wants besides, by model type."""

KV_HEADS = ("num_key_value_heads", "num_kv_heads", "num_global_key_value_heads")

TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LENGTH, DECODER_LENGTH, NEW_TOKENS = 12, 5, 6
MAX_PARAMETERS = 40_000_000

CHECKS = ("forward", "left padding", "right padding", "packed", "generate")


class Outcome(NamedTuple):
    """How one check of one model went."""

    verdict: str  # "equal", "refused", "wrong", "error", or "not run" where eager attention does not run it either
    detail: str = ""


def model_classes() -> dict[str, list[type]]:
    """The model classes of each family that a model can be made of, those that generate first."""
    mappings = [name for name in vars(modeling_auto) if name.startswith("MODEL_") and name.endswith("MAPPING_NAMES")]
    generating = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SPEECH_SEQ_2_SEQ", "SEQ_TO_SEQ", "MODEL_MAPPING")
    mappings.sort(key=lambda name: next((i for i, part in enumerate(generating) if part in name), len(generating)))
    names: dict[str, list[str]] = {}
    for mapping in mappings:
        for family, found in getattr(modeling_auto, mapping).items():
            names.setdefault(family, []).extend([found] if isinstance(found, str) else found)
    classes = {}
    for family, found in names.items():
        there = [getattr(transformers, name, None) for name in dict.fromkeys(found)]
        classes[family] = [cls for cls in there if hasattr(cls, "_supports_flash_attn")]
    return {family: found for family, found in sorted(classes.items()) if found}


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
            if size > MAX_PARAMETERS:
                raise NotBuilt(f"{size // 10**6} million parameters at the least")
            model = build(model_class, config, "eager")
        except Exception as error:
            problem = problem or error
            continue
        for inputs in _inputs(model):
            try:
                with torch.no_grad():
                    model(**inputs)
                return Sample(config, inputs)
            except Exception as error:
                problem = problem or error
    raise NotBuilt(_first_line(problem or NotBuilt("takes none of the inputs tried")))


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


def _inputs(model: Any) -> Iterator[dict[str, Tensor]]:
    """What the model's forward may take: text if it can, an image or sound, or both."""
    takes = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(0)
    parts = [model.config]
    for part in parts:
        parts.extend(getattr(part, name) for name in part.sub_configs or {} if getattr(part, name, None) is not None)

    def setting(*names: str, default: Any) -> Any:
        return next((value for part in parts for name in names if (value := getattr(part, name, None))), default)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def tokens(length: int, *names: str) -> Tensor:
        return torch.randint(3, setting(*names, default=128) - 1, (2, length), generator=generator)

    size, channels = setting("image_size", default=32), setting("num_channels", "in_channels", "in_chans", default=3)
    height, width = (size, size) if isinstance(size, int) else size
    mel = setting("num_mel_bins", "feature_size", "mel_bins", default=80)
    frames = setting("num_frames", "frames_per_clip", "tubelet_size", default=4)
    patch = setting("patch_size", default=8)
    grid = torch.tensor([[1, 4, 4], [1, 4, 8]])
    patches = random(
        48, channels * setting("temporal_patch_size", default=1) * (patch if isinstance(patch, int) else patch[0]) ** 2
    )
    made = {
        "input_ids": lambda: tokens(LENGTH, "vocab_size"),
        "pixel_values": lambda: random(2, channels, height, width),
        "pixel_values_videos": lambda: random(2, frames if isinstance(frames, int) else frames[0], channels, height, width),
        "input_features": lambda: random(2, mel, 2 * setting("max_source_positions", default=50)),
        "input_values": lambda: random(2, 4000),
        "past_values": lambda: random(2, setting("context_length", default=32), setting("num_input_channels", default=1)),
        "inputs_embeds": lambda: random(2, LENGTH, setting("hidden_size", default=64)),
        "grid_thw": lambda: grid,
        "hidden_states": lambda: patches,
    }
    decoder = {}
    if "decoder_input_ids" in takes:
        decoder["decoder_input_ids"] = tokens(DECODER_LENGTH, "vocab_size", "decoder_vocab_size")
    for names in (
        ("input_ids",),
        ("pixel_values",),
        ("input_ids", "pixel_values"),
        ("input_features",),
        ("input_values",),
        ("pixel_values_videos",),
        ("input_ids", "pixel_values_videos"),
        ("inputs_embeds",),
        ("hidden_states", "grid_thw"),
        ("pixel_values", "grid_thw"),
        ("past_values",),
    ):
        if all(name in takes for name in names):
            inputs = {name: made[name]() for name in names}
            if names == ("pixel_values", "grid_thw"):
                inputs["pixel_values"] = patches
            yield {**inputs, **decoder}
            if names in (("pixel_values",), ("input_values",), ("input_features",)):  # other layouts of the same
                other = {"pixel_values": random(2, frames if isinstance(frames, int) else 4, channels, height, width),
                         "input_values": random(2, 1, 4000), "input_features": random(2, 100, mel)}[names[0]]  # fmt: skip
                yield {names[0]: other, **decoder}


Run = Callable[[Any], list[Tensor]]


def checks_of(model: Any, inputs: dict[str, Tensor]) -> Iterator[tuple[str, Run]]:
    """What there is to compare: a name of CHECKS, and what gives the tensors that must be equal."""
    takes = inspect.signature(model.forward).parameters
    yield "forward", lambda model: _tensors(model(**inputs), None)

    text = inputs.get("input_ids", inputs.get("inputs_embeds"))
    if text is not None and "attention_mask" in takes:
        for side in ("left", "right"):
            mask = torch.ones(text.shape[:2], dtype=torch.long)
            mask[0, slice(0, 4) if side == "left" else slice(-4, None)] = 0
            padded = {**inputs, "attention_mask": mask}
            if "input_ids" in inputs:  # ends with the end token: some models take what stands there
                last = mask * torch.arange(1, LENGTH + 1)
                ends = last == last.amax(-1, keepdim=True)
                padded["input_ids"] = torch.where(ends, TOKENS["eos_token_id"], inputs["input_ids"] * mask)
            yield f"{side} padding", lambda model, padded=padded, mask=mask: _tensors(model(**padded), mask)

    if "input_ids" in inputs and "position_ids" in takes and "decoder_input_ids" not in inputs:
        positions = torch.cat((torch.arange(5), torch.arange(LENGTH - 5)))[None]
        packed = {"input_ids": inputs["input_ids"][:1], "position_ids": positions}
        if "use_cache" in takes or "past_key_values" in takes or "cache" in takes:
            packed["use_cache"] = False
        yield "packed", lambda model: _tensors(model(**packed), None)

    if "input_ids" in inputs and model.can_generate():
        mask = torch.ones_like(inputs["input_ids"])
        mask[0, :4] = 0
        yield "generate", lambda model: [_generate(model, inputs["input_ids"] * mask, mask)]


def _generate(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    model.generation_config.eos_token_id = None
    return model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)


def _tensors(output: Any, mask: Tensor | None) -> list[Tensor]:
    """The tensors of a model's output; of those that have a row for each token, the rows that are no padding."""
    found = [value for value in (output.values() if isinstance(output, Mapping) else [output]) if isinstance(value, Tensor)]
    if mask is None:
        return found
    return [value[mask.bool()] if value.shape[:2] == mask.shape else value for value in found]


def check(family: str, classes: list[Any]) -> tuple[str, dict[str, Outcome]]:
    """Each check of the first of these models that can be made, and its name."""
    problem = ""
    for model_class in classes[:3]:
        if model_class._supports_flash_attn:
            try:
                made = sample(family, model_class)
            except NotBuilt as error:
                problem = problem or str(error)
                continue
            return model_class.__name__, _check(model_class, made)
    refusal = _refusal(family, classes[0])
    if problem and refusal.verdict != "refused":
        return classes[0].__name__, {"forward": Outcome("not run", problem)}
    return classes[0].__name__, {"forward": refusal}


def _check(model_class: Any, made: Sample) -> dict[str, Outcome]:
    config, inputs = made
    eager = build(model_class, config, "eager")
    try:
        model = build(model_class, config, "pagedflash")
    except Exception as error:
        return {"forward": _failed(error)}
    outcomes = {}
    for name, run in checks_of(eager, inputs):
        outcomes[name] = _compare(run, eager, model)
    return outcomes


def _refusal(family: str, model_class: Any) -> Outcome:
    """Of a family that flash attention cannot run, which need not be built for it."""
    try:
        with torch.device("meta"):
            model_class._from_config(CONFIG_MAPPING[family](), attn_implementation="pagedflash")
    except ImportError as error:
        return Outcome("not run", _first_line(error))
    except Exception as error:
        return _failed(error)
    return Outcome("wrong", "accepted, though transformers says that flash attention cannot run it")


def _compare(run: Run, eager: Any, model: Any) -> Outcome:
    try:
        with torch.no_grad():
            torch.manual_seed(0)
            expected = run(eager)
    except Exception as error:
        return Outcome("not run", _first_line(error))
    try:
        with torch.no_grad(), pagedflash.count_calls() as calls:
            torch.manual_seed(0)
            came = run(model)
    except Exception as error:
        return _failed(error)
    for want, have in zip(expected, came, strict=True):
        if want.shape != have.shape or want.dtype != have.dtype:
            return Outcome("wrong", f"{tuple(have.shape)} for {tuple(want.shape)}")
        if not want.is_floating_point():
            if not torch.equal(want, have):
                return Outcome("wrong", "other tokens")
            continue
        if not torch.isfinite(want).all():
            return Outcome("not run", "eager attention gives no finite numbers")
        error = ((want - have).abs().max() / want.abs().max().clamp(min=1e-6)).item() if want.numel() else 0.0
        if not error < 2e-3:
            return Outcome("wrong", f"off by {error:.1g} of the largest value")
    if not calls:
        return Outcome("wrong", "never calls a kernel")
    return Outcome("equal")


def _failed(error: Exception) -> Outcome:
    sentence = isinstance(error, ValueError) and "pagedflash" in str(error) and "support" in str(error)
    return Outcome("refused" if sentence or "pagedflash:" in str(error) else "error", _first_line(error))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:200]


def main(families: list[str]) -> None:
    """Print a line for each family."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity(50)
    pagedflash.transformers.enable()
    counts: Counter[str] = Counter()
    for family, classes in model_classes().items():
        if families and family not in families:
            continue
        name, outcomes = check(family, classes)
        counts.update(outcome.verdict for outcome in outcomes.values())
        print(family, name, {k: (v.verdict, v.detail) if v.detail else v.verdict for k, v in outcomes.items()}, flush=True)
    print(counts)


if __name__ == "__main__":
    main(sys.argv[1:])
