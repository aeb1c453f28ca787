"""Every model family of transformers as a tiny random model, and how it fares on "pagedflash" beside eager attention.

``python tests/families.py`` prints the table of docs/transformers.md; ``python tests/families.py llama bart`` those families.
"""

from __future__ import annotations

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
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 16),
    # numbers of things
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads",), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "num_global_key_value_heads"), 2),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers", "depth"), 2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
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


def build(family: str, model_class: Any, implementation: str) -> Any:
    """A tiny model with random weights, large enough for attention to decide what comes out.

    Raises:
        NotBuilt: its configuration cannot be made small in any of the ways tried.
    """
    problem: Exception = NotBuilt("no configuration tried")
    for grouped, kinds in ((True, True), (True, False), (False, True), (False, False)):
        try:
            config = _tiny(CONFIG_MAPPING[family], CONFIG_MAPPING[family](), grouped, kinds)
            with torch.device("meta"):
                size = sum(weights.numel() for weights in model_class._from_config(config).parameters())
            if size > MAX_PARAMETERS:
                raise NotBuilt(f"{size // 10**6} million parameters at the least")
        except Exception as error:
            problem = error
            continue
        torch.manual_seed(0)
        model = model_class._from_config(config, attn_implementation=implementation, dtype=torch.float32).eval()
        _randomize(model)
        return model
    raise NotBuilt(_first_line(problem))


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
        elif name == "head_dim" and value is None:
            options[name] = SMALL[name]
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
    return config_class(**options)


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


def inputs_of(model: Any) -> dict[str, Tensor]:
    """What the model's forward takes: text if it can, else an image or sound."""
    takes = inspect.signature(model.forward).parameters
    config = model.config
    generator = torch.Generator().manual_seed(0)

    def setting(*names: str, default: Any) -> Any:
        for part in (config, *(getattr(config, name) for name in config.sub_configs or {} if getattr(config, name, None))):
            for name in names:
                if getattr(part, name, None):
                    return getattr(part, name)
        return default

    inputs: dict[str, Tensor] = {}
    if "input_ids" in takes:
        vocabulary = setting("vocab_size", default=128)
        inputs["input_ids"] = torch.randint(3, vocabulary - 1, (2, LENGTH), generator=generator)
    elif "pixel_values" in takes:
        size = setting("image_size", default=32)
        height, width = (size, size) if isinstance(size, int) else size
        inputs["pixel_values"] = torch.randn(2, setting("num_channels", default=3), height, width, generator=generator)
    elif "input_features" in takes:
        positions = setting("max_source_positions", default=50)
        mel = setting("num_mel_bins", "feature_size", default=80)
        inputs["input_features"] = torch.randn(2, mel, 2 * positions, generator=generator)
    elif "input_values" in takes:
        inputs["input_values"] = torch.randn(2, 4000, generator=generator)
    elif "inputs_embeds" in takes:
        inputs["inputs_embeds"] = torch.randn(2, LENGTH, setting("hidden_size", default=64), generator=generator)
    if "decoder_input_ids" in takes:
        vocabulary = setting("vocab_size", "decoder_vocab_size", default=128)
        inputs["decoder_input_ids"] = torch.randint(3, vocabulary - 1, (2, DECODER_LENGTH), generator=generator)
    return inputs


Run = Callable[[Any], list[Tensor]]


def checks_of(model: Any) -> Iterator[tuple[str, Run]]:
    """What there is to compare: a name of CHECKS, and what gives the tensors that must be equal."""
    takes = inspect.signature(model.forward).parameters
    inputs = inputs_of(model)
    yield "forward", lambda model: _tensors(model(**inputs), None)

    text = inputs.get("input_ids", inputs.get("inputs_embeds"))
    if text is not None and "attention_mask" in takes:
        for side in ("left", "right"):
            mask = torch.ones(text.shape[:2], dtype=torch.long)
            mask[0, slice(0, 4) if side == "left" else slice(-4, None)] = 0
            padded = {**inputs, "attention_mask": mask}
            if "input_ids" in inputs:
                padded["input_ids"] = inputs["input_ids"] * mask
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


def check(family: str, model_class: Any) -> dict[str, Outcome]:
    """Each check of one model."""
    try:
        eager = build(family, model_class, "eager")
    except NotBuilt as problem:
        if not model_class._supports_flash_attn:
            return _refusal(family, model_class)
        return {"forward": Outcome("not run", str(problem))}
    try:
        model = build(family, model_class, "pagedflash")
    except Exception as error:
        return {"forward": _failed(error)}
    outcomes = {}
    for name, run in checks_of(eager):
        outcomes[name] = _compare(run, eager, model)
    return outcomes


def _refusal(family: str, model_class: Any) -> dict[str, Outcome]:
    """Of a family that flash attention cannot run and that is too large to build."""
    try:
        with torch.device("meta"):
            model_class._from_config(CONFIG_MAPPING[family](), attn_implementation="pagedflash")
    except Exception as error:
        return {"forward": _failed(error)}
    return {"forward": Outcome("wrong", "accepted, though transformers says that flash attention cannot run it")}


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
    return Outcome("refused" if "pagedflash:" in str(error) else "error", _first_line(error))


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
        outcomes = check(family, classes[0])
        counts.update(outcome.verdict for outcome in outcomes.values())
        print(
            family,
            classes[0].__name__,
            {k: (v.verdict, v.detail) if v.detail else v.verdict for k, v in outcomes.items()},
            flush=True,
        )
    print(counts)


if __name__ == "__main__":
    main(sys.argv[1:])
