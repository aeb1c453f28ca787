"""Which models may use "pagedflash", and what comes of it: transformers' own rule, and what is peculiar about some."""

from __future__ import annotations

import re
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
import transformers
from models import SIZES, enabled, implementation  # noqa: F401
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, StaticCache

import pagedflash
from pagedflash.integrations.transformers import hooks

pytestmark = pytest.mark.usefixtures("enabled")

SMALL = dict(vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
IDS = torch.tensor([[5, 7, 11, 13, 17, 19, 23], [29, 31, 37, 41, 43, 47, 53]])
LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])


def refusal(name: str, why: str = ".*") -> str:
    """The one form of sentence, naming a model."""
    return rf'^pagedflash: {name} is not supported: {why}; use attn_implementation="sdpa" or "eager"$'


def llama(name: str, **options: Any) -> Any:
    return of(AutoModelForCausalLM.from_config, LlamaConfig(**{**SIZES, **options}), name)


def of(make: Any, config: Any, name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return make(config, attn_implementation=name, **options).eval()


def assert_as_eager(make: Any, run: Any) -> None:
    """``make(name)`` gives the model, ``run(model)`` a tensor."""
    expected, came = run(make("eager")), run(make("pagedflash"))
    if torch.is_floating_point(expected):
        torch.testing.assert_close(came, expected, rtol=1e-3, atol=1e-4)
    else:
        assert came.tolist() == expected.tolist()


@pytest.mark.parametrize(
    "name, config",
    [
        ("T5Model", "T5Config"),
        ("BloomModel", "BloomConfig"),
        ("MPNetModel", "MPNetConfig"),
        ("DebertaModel", "DebertaConfig"),
        ("RoFormerModel", "RoFormerConfig"),
        ("SwinModel", "SwinConfig"),
        ("Siglip2VisionModel", "Siglip2VisionConfig"),
    ],
)
def test_models_without_flash_attention(name: str, config: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=refusal(name, "transformers says .*")):
        getattr(transformers, name)._from_config(getattr(transformers, config)(), attn_implementation="pagedflash")


@pytest.mark.parametrize(
    "name, config",
    [
        ("FalconModel", "FalconConfig"),
        ("GPTJModel", "GPTJConfig"),
        ("GPTNeoModel", "GPTNeoConfig"),
        ("BarkModel", "BarkConfig"),
        ("SamModel", "SamConfig"),
        ("Data2VecVisionModel", "Data2VecVisionConfig"),
    ],
)
def test_models_with_attention_tables_of_their_own(name: str, config: str) -> None:
    if name == "GPTJModel" and hooks.version_numbers() >= (5, 24):
        pytest.skip("asks transformers for its attention from 5.24 on")
    with torch.device("meta"), pytest.raises(ValueError, match=refusal(name)):
        getattr(transformers, name)._from_config(getattr(transformers, config)(), attn_implementation="pagedflash")


def test_a_part_of_a_model_is_named() -> None:
    """The whole may use flash attention, its encoder not; given an implementation of its own, it need not."""
    encoder = transformers.BeitConfig(**{**SMALL, "image_size": 32, "patch_size": 8})
    decoder = transformers.BertConfig(**SMALL, is_decoder=True, add_cross_attention=True)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    make = transformers.VisionEncoderDecoderModel._from_config
    with pytest.raises(ValueError, match=refusal("BeitModel")):
        make(config, attn_implementation="pagedflash")
    model = make(config, attn_implementation={"": "eager", "encoder": "eager", "decoder": "pagedflash"}).eval()
    with torch.no_grad(), pagedflash.count_calls() as calls:
        model(pixel_values=torch.randn(1, 3, 32, 32), decoder_input_ids=IDS[:1])
    assert sum(calls.values()) == 4, "self and cross attention of two decoder layers"


def test_setting_it_later_is_refused_too() -> None:
    model = transformers.T5Model(transformers.T5Config(vocab_size=96, d_model=64, d_ff=64, num_layers=2, num_heads=4))
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=refusal("T5Model")):
        model.set_attn_implementation("pagedflash")
    assert model.config._attn_implementation == before


def test_other_names_are_left_alone() -> None:
    """Neither refused by us nor changed."""
    with torch.device("meta"):
        for name in ("eager", "sdpa"):
            transformers.BloomModel._from_config(transformers.BloomConfig(), attn_implementation="eager")
            assert AutoModel.from_config(LlamaConfig(**SIZES), attn_implementation=name).config._attn_implementation == name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_without_a_linear(dtype: torch.dtype) -> None:
    """GPT-2's are convolutions."""
    sizes = dict(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2)
    config = transformers.GPT2Config(**sizes)
    expected, came = (
        of(transformers.GPT2LMHeadModel._from_config, config, name, dtype=dtype)(IDS).logits
        for name in ("eager", "pagedflash")
    )
    torch.testing.assert_close(came, expected, rtol=1e-3, atol=5e-2 if dtype == torch.bfloat16 else 1e-4)


def test_dynamically_quantized() -> None:
    def make(name: str) -> Any:
        return torch.ao.quantization.quantize_dynamic(llama(name), {torch.nn.Linear}, dtype=torch.qint8)

    assert_as_eager(make, lambda model: model(IDS).logits)  # unpadded: what padding gets would count for the scales


def test_without_no_grad() -> None:
    assert_as_eager(llama, lambda model: model(IDS).logits)
    assert_as_eager(llama, lambda model: model(IDS, attention_mask=LEFT).logits[:, 3:])
    assert llama("pagedflash")(IDS).logits.requires_grad


def bart(name: str) -> Any:
    sizes = dict(encoder_ffn_dim=64, decoder_ffn_dim=64, encoder_attention_heads=4, decoder_attention_heads=4)
    layers = dict(encoder_layers=2, decoder_layers=2, init_std=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config = transformers.BartConfig(vocab_size=96, d_model=64, **sizes, **layers)
    return of(transformers.BartForConditionalGeneration._from_config, config, name)


@pytest.mark.parametrize("decoder_tokens", [1, 5, 7])
@pytest.mark.parametrize("side", ["left", "right"])
def test_cross_attention_to_a_padded_encoder(decoder_tokens: int, side: str) -> None:
    mask = LEFT if side == "left" else LEFT.flip(-1)
    assert_as_eager(bart, lambda model: model(IDS, attention_mask=mask, decoder_input_ids=IDS[:, :decoder_tokens]).logits)


def test_cross_attention_in_generate() -> None:
    def run(model: Any) -> torch.Tensor:
        model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
        return model.generate(IDS, attention_mask=LEFT, decoder_input_ids=IDS[:, :3], max_new_tokens=8, do_sample=False)

    assert_as_eager(bart, run)


def test_cross_attention_of_an_encoder_made_a_decoder() -> None:
    def make(name: str) -> Any:
        options = dict(initializer_range=0.3, is_decoder=True, add_cross_attention=True)
        return of(transformers.BertModel._from_config, transformers.BertConfig(**SMALL, **options), name)

    states = torch.randn(2, 7, 64)
    assert_as_eager(make, lambda model: model(IDS[:, :5], encoder_hidden_states=states, encoder_attention_mask=LEFT)[0])


@pytest.mark.parametrize("mask", [None, torch.ones(2, 7), LEFT], ids=["no mask", "ones", "left padding"])
def test_a_static_cache(mask: torch.Tensor | None) -> None:
    """What is not written yet is not seen; in one call or in two."""
    first = 0 if mask is None or mask.all() else 3

    def run(model: Any) -> torch.Tensor:
        cache = StaticCache(config=model.config, max_cache_len=32)
        options = {} if mask is None else {"attention_mask": mask[:, :5]}
        model(IDS[:, :5], past_key_values=cache, **options)
        options = {} if mask is None else {"attention_mask": mask}
        return model(IDS[:, 5:], past_key_values=cache, **options).logits

    assert_as_eager(llama, run)
    cached = lambda model: StaticCache(config=model.config, max_cache_len=32)  # noqa: E731
    assert_as_eager(llama, lambda model: model(IDS, attention_mask=mask, past_key_values=cached(model)).logits[:, first:])


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_generate_with_a_static_cache(family: str) -> None:
    """Sliding windows too, over their end; as tokens and without a copy of the cache."""
    options = dict(sliding_window=5, query_pre_attn_scalar=16) if family == "gemma3_text" else {}

    def make(name: str) -> Any:
        config = transformers.AutoConfig.for_model(family, **SIZES, **options)
        return of(AutoModelForCausalLM.from_config, config, name)

    def run(model: Any) -> torch.Tensor:
        model.generation_config.eos_token_id = None
        return model.generate(
            IDS * LEFT, attention_mask=LEFT, max_new_tokens=12, do_sample=False, cache_implementation="static"
        )

    with pagedflash.count_calls() as calls:
        assert_as_eager(make, run)
    assert {kind.layout for kind in calls} == {"dense"}


def test_whisper_with_a_static_cache() -> None:
    sizes = dict(encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4)
    lengths = dict(max_source_positions=50, max_target_positions=60, pad_token_id=0, eos_token_id=2, bos_token_id=1)
    config = transformers.WhisperConfig(
        vocab_size=96, num_mel_bins=8, d_model=64, encoder_ffn_dim=64, decoder_ffn_dim=64, init_std=0.3,
        decoder_start_token_id=1, begin_suppress_tokens=None, **sizes, **lengths,
    )  # fmt: skip
    sound = torch.randn(2, 8, 100, generator=torch.Generator().manual_seed(0))

    def run(model: Any) -> torch.Tensor:
        model.generation_config.eos_token_id = model.generation_config.begin_suppress_tokens = None
        return model.generate(sound, max_new_tokens=10, do_sample=False, cache_implementation="static")

    assert_as_eager(lambda name: of(transformers.WhisperForConditionalGeneration._from_config, config, name), run)


def test_a_prompt_in_two_parts() -> None:
    """Several tokens behind a cache, with padding on the left."""

    def run(model: Any) -> torch.Tensor:
        past = model(IDS[:, :5], attention_mask=LEFT[:, :5]).past_key_values
        return model(IDS[:, 5:], attention_mask=LEFT, past_key_values=past).logits

    assert_as_eager(llama, run)


def test_padding_between_tokens() -> None:
    """Right for full attention, refused for windows."""
    mask = torch.tensor([[1, 1, 0, 0, 1, 1, 1], [1] * 7])
    assert_as_eager(llama, lambda model: model(IDS, attention_mask=mask).logits[mask.bool()])
    mistral = transformers.MistralConfig(**SIZES, sliding_window=4)
    model = of(AutoModelForCausalLM.from_config, mistral, "pagedflash")
    with pytest.raises(ValueError, match=refusal("a mask with padding between tokens and a sliding window")):
        model(IDS, attention_mask=mask)


@pytest.mark.parametrize("family, options", [("llama", {}), ("mistral", dict(sliding_window=2))])
def test_packed_sequences(family: str, options: dict[str, Any]) -> None:
    config = transformers.AutoConfig.for_model(family, **SIZES, **options)
    packed = dict(input_ids=IDS[:1], position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3]]), use_cache=False)
    assert_as_eager(lambda name: of(AutoModelForCausalLM.from_config, config, name), lambda model: model(**packed).logits)


def test_a_4d_mask() -> None:
    mask = torch.zeros(1, 1, 7, 7)
    with pytest.raises(ValueError, match=refusal(re.escape("a mask of shape (1, 1, 7, 7)"))):
        llama("pagedflash")(IDS[:1], attention_mask=mask)


def gemma3(name: str) -> Any:
    vision = dict(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    text = {**SIZES, "sliding_window": 64, "query_pre_attn_scalar": 16}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_id=90, boi_token_id=91, eoi_token_id=92
    )
    return of(transformers.Gemma3ForConditionalGeneration._from_config, config, name)


def refused_as_a_whole(make: Any, model_class: Any) -> bool:
    """From 5.24 on transformers runs models whose images or prompts see all of themselves without flash attention."""
    if model_class._supports_flash_attn:
        return False
    with pytest.raises(ValueError, match=refusal(model_class.__name__)):
        make("pagedflash")
    return True


def test_an_image_that_sees_all_of_itself() -> None:
    """Gemma 3: refused with an image, as eager without."""
    if refused_as_a_whole(gemma3, transformers.Gemma3ForConditionalGeneration):
        return
    ids = torch.tensor([[1, 5, 91, 90, 90, 90, 90, 92, 7, 11]])
    image = dict(pixel_values=torch.randn(1, 3, 32, 32), token_type_ids=(ids == 90).long())
    with pytest.raises(ValueError, match=refusal("this model's mask")):
        gemma3("pagedflash")(ids, **image)
    text = IDS[:1]
    assert_as_eager(gemma3, lambda model: model(text, token_type_ids=torch.zeros_like(text)).logits)


def test_a_prefix_that_sees_all_of_itself() -> None:
    """PaliGemma: as eager where the prompt is all there is, which is how it answers; refused with an answer behind it."""
    text = {**SIZES, "num_key_value_heads": 1}
    vision = dict(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    config = transformers.PaliGemmaConfig(
        text_config=dict(model_type="gemma", **text), vision_config=vision, image_token_index=90, projection_dim=64,
    )  # fmt: skip
    make = lambda name: of(transformers.PaliGemmaForConditionalGeneration._from_config, config, name)  # noqa: E731
    types = torch.tensor([[0, 0, 0, 0, 1, 1, 1]])
    if refused_as_a_whole(make, transformers.PaliGemmaForConditionalGeneration):
        return
    assert_as_eager(make, lambda model: model(IDS[:1]).logits)
    with pytest.raises(ValueError, match=refusal("this model's mask")):
        make("pagedflash")(IDS[:1], token_type_ids=types)

    def answer(model: Any, **options: Any) -> torch.Tensor:
        model.generation_config.eos_token_id = None
        ids = dict(input_ids=IDS * LEFT, attention_mask=LEFT, token_type_ids=torch.zeros_like(IDS))
        return model.generate(**ids, max_new_tokens=6, do_sample=False, **options)

    assert_as_eager(make, answer)
    assert_as_eager(make, lambda model: answer(model, cache_implementation="static"))


@pytest.fixture
def compiler() -> Any:
    """Nothing compiled before counts."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("mask", [None, LEFT], ids=["no mask", "left padding"])
def test_compiled_as_plain(mask: torch.Tensor | None) -> None:
    """In one graph, padded or not, over a growing cache and over a static one."""
    model = llama("pagedflash", num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS, attention_mask=mask).logits, model(IDS, attention_mask=mask).logits)
        caches = [StaticCache(config=model.config, max_cache_len=16) for _ in range(2)]
        for start, end in ((0, 5), (5, 6)):
            options = {} if mask is None else {"attention_mask": mask[:, :end]}
            came, expected = (
                run(IDS[:, start:end], past_key_values=cache, **options).logits
                for run, cache in zip((compiled, model), caches)
            )
            torch.testing.assert_close(came, expected)


@pytest.mark.usefixtures("compiler")
def test_generate_compiles_one_step_for_all() -> None:
    """Over a static cache, as transformers does on CUDA: the mask of a step comes ready, and asks for no other graph."""
    options = dict(attention_mask=LEFT, max_new_tokens=6, do_sample=False, cache_implementation="static")
    model = llama("pagedflash", num_hidden_layers=1)
    model.generation_config.eos_token_id = None
    expected = model.generate(IDS * LEFT, **options)
    compile_config = transformers.CompileConfig(backend="aot_eager", mode=None, fullgraph=False)
    compile_config._compile_all_devices = True
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert model.generate(IDS * LEFT, **options, compile_config=compile_config).tolist() == expected.tolist()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.usefixtures("compiler")
def test_compiled_packed() -> None:
    """With lengths; told by positions alone, the compiled graph notices, since it cannot look for them."""
    model = llama("pagedflash", num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    offsets = torch.tensor([0, 3, 7], dtype=torch.int32)
    packed = dict(input_ids=IDS[:1], position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3]]), use_cache=False)
    lengths = dict(cu_seq_lens_q=offsets, cu_seq_lens_k=offsets, max_length_q=4, max_length_k=4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**packed, **lengths).logits, model(**packed).logits)
        with pytest.raises(RuntimeError, match="pagedflash: sequences packed without cu_seq_lens_q"):
            compiled(**packed)
        compiled(**{**packed, "position_ids": torch.arange(7)[None]})
