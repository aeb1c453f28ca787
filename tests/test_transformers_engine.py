"""Continuous batching through pages: tokens as eager's, no gather in any step, every page given back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from models import SIZES, enabled, greedy, implementation, layouts, padded, rounded_caches  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, CompileConfig, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import pagedflash
import pagedflash.transformers as integration
from pagedflash.integrations.transformers import engine, formats, hooks

if hooks.version_numbers() < engine.FIRST_VERSION:
    pytest.skip("transformers before 5.19 batches in its own way", allow_module_level=True)

from transformers.generation.continuous_batching import cache as cache_module
from transformers.generation.continuous_batching import initialization as gate
from transformers.generation.continuous_batching import input_outputs, model_runner, offloading_manager
from transformers.generation.continuous_batching import scheduler as scheduler_module
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.cache_allocators import (
    FullAttentionCacheAllocator,
    SlidingAttentionCacheAllocator,
)
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs

from pagedflash.integrations.transformers.engine import inputs, windows

WINDOW, PAGE_SIZE, LAYERS = 6, 4, 2
EXPERTS = dict(num_experts_per_tok=2)
GEMMA = dict(sliding_window=WINDOW, query_pre_attn_scalar=16)
FULL_AND_WINDOW = dict(layer_types=["full_attention", "sliding_attention"])

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {}),
    "qwen2-moe": ("qwen2_moe", dict(num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16, **EXPERTS)),
    "olmo2": ("olmo2", dict(num_key_value_heads=4)),
    "mistral": ("mistral", dict(sliding_window=WINDOW)),
    "phi3": ("phi3", dict(sliding_window=WINDOW)),
    "qwen2 with windows": ("qwen2", dict(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)),
    "gemma2": ("gemma2", dict(attn_logit_softcapping=1.5, **GEMMA)),
    "gemma3": ("gemma3_text", dict(**GEMMA, **FULL_AND_WINDOW)),
    "gpt-oss": ("gpt_oss", dict(sliding_window=WINDOW, num_local_experts=4, **EXPERTS)),
    "cohere2": ("cohere2", dict(sliding_window=WINDOW, **FULL_AND_WINDOW)),
}
PROMPTS = [[5, 7, 11], [13] * 3 + list(range(17, 60)), [43, 47], [53, 59, 61, 67, 71, 73] * 4]
NEW_TOKENS = 12


@pytest.fixture(autouse=True)
def gathers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Copies of keys and values out of the cache, by allocator; and for every test: none while "pagedflash" is enabled."""
    counts: Counter[str] = Counter()
    for allocator in (FullAttentionCacheAllocator, SlidingAttentionCacheAllocator):

        def update(self: Any, *args: Any, original: Any = allocator.update) -> Any:
            counts[type(self).__name__] += 1
            return original(self, *args)

        monkeypatch.setattr(allocator, "update", update)
    yield counts
    integration.disable()
    assert not counts


@pytest.fixture
def kv_cache_dtype(request: pytest.FixtureRequest) -> Iterator[str | None]:
    """The format named by the test's parameter, in force."""
    integration.enable(kv_cache_dtype=request.param)
    yield request.param
    integration.disable()


@pytest.fixture
def caches() -> Iterator[list[PagedAttentionCache]]:
    """Every cache that is made. After ``kv_cache_dtype``, which changes the same method."""
    made: list[PagedAttentionCache] = []
    initialize = PagedAttentionCache.__init__

    def record(self: PagedAttentionCache, *args: Any, **kwargs: Any) -> None:
        initialize(self, *args, **kwargs)
        made.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PagedAttentionCache, "__init__", record)
        yield made


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Query tokens of each request, for every step that is prepared."""
    seen: list[list[int]] = []
    prepare = inputs.PagedInputs.prepare_batch_tensors

    def record(self: Any, requests_in_batch: list[Any], *args: Any, **kwargs: Any) -> None:
        seen.append([request.query_length for request in requests_in_batch])
        prepare(self, requests_in_batch, *args, **kwargs)

    monkeypatch.setattr(inputs.PagedInputs, "prepare_batch_tensors", record)
    return seen


def random_model(family: str, name: str = "pagedflash") -> Any:
    kind, options = FAMILIES[family]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **options})
    return AutoModelForCausalLM.from_config(config, attn_implementation=name, dtype=torch.float32).eval()


def expected_tokens(model: Any, prompts: list[list[int]], new_tokens: int = NEW_TOKENS) -> list[list[int]]:
    """Each prompt alone, by eager attention."""
    with implementation(model, "eager"):
        return [padded(model, [prompt], new_tokens)[0] for prompt in prompts]


def configuration(**options: Any) -> ContinuousBatchingConfig:
    """Small pages, and chunks of prompts beside decoding requests."""
    sizes = dict(page_size=PAGE_SIZE, num_blocks=64, max_batch_tokens=16, safety_margin=0.0)
    return ContinuousBatchingConfig(**{**sizes, **options})


def batched(model: Any, prompts: list[list[int]], new_tokens: int = NEW_TOKENS, **options: Any) -> list[Any]:
    """The outputs of ``generate_batch()``."""
    outputs = model.generate_batch(
        prompts,
        generation_config=greedy(model, new_tokens),
        continuous_batching_config=configuration(**options),
        warmup=False,
    )
    assert [output.error for output in outputs.values()] == [None] * len(prompts)
    return list(outputs.values())


def tokens(outputs: list[Any]) -> list[list[int]]:
    return [output.generated_tokens for output in outputs]


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_step_goes_through_pages(family: str, steps: list[list[int]]) -> None:
    """Whole prompts, chunks of them, chunks beside decoding requests, decoding: tokens as eager's, one call a layer."""
    model = random_model(family)
    expected = expected_tokens(model, PROMPTS)
    with pagedflash.count_calls() as calls:
        assert tokens(batched(model, PROMPTS)) == expected
    decoding = sum(set(step) == {1} for step in steps)
    assert any(1 in step and max(step) > 1 for step in steps) and 0 < decoding < len(steps)
    others = LAYERS * (len(steps) - decoding)
    assert layouts(calls) == {"paged": LAYERS * decoding, "paged varlen": others}


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_pages_that_left_the_window_are_given_back(
    family: str, caches: list[PagedAttentionCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No request holds more than a window and a chunk, and in the end none holds anything."""
    held: list[int] = []
    allocate = windows.WindowPages.allocate_cache_to_request

    def record(self: Any, request_id: str, past_length: int, query_length: int) -> None:
        allocate(self, request_id, past_length, query_length)
        live = [block for block in self.block_table[request_id] if block != windows.GONE]
        held.append(len(live) * PAGE_SIZE - query_length)

    monkeypatch.setattr(windows.WindowPages, "allocate_cache_to_request", record)
    model = random_model(family)
    assert tokens(batched(model, PROMPTS)) == expected_tokens(model, PROMPTS)
    assert len(PROMPTS[1]) > 5 * WINDOW and max(held) <= WINDOW + 2 * PAGE_SIZE
    (cache,) = caches
    assert_all_free(cache)


def assert_all_free(cache: PagedAttentionCache) -> None:
    """Every block is back in the pool, once those kept for prefixes are evicted, and nothing is remembered of a request."""
    cache.evict_cached_blocks()
    assert cache.compute_free_capacity() == 1
    for allocator in cache.cache_allocators.values():
        free = [block for blocks in cache.pool._free_blocks[allocator.index].trees.values() for block in blocks]
        assert len(free) == len(set(free)) and 0 not in free
        assert not allocator.block_table and not allocator.ledger.shared_ref_counts
        if isinstance(allocator, windows.WindowPages):
            assert not allocator.first_live and not allocator.hashes


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_shared_prefixes(family: str, steps: list[list[int]], caches: list[PagedAttentionCache]) -> None:
    """Prompts that begin alike compute the beginning once, in models with windows too."""
    prefix = list(range(5, 45))
    prompts = [[*prefix, 50 + i, *range(60, 60 + i)] for i in range(4)]
    model = random_model(family)
    expected = expected_tokens(model, prompts)
    assert tokens(batched(model, prompts, allow_block_sharing=False)) == expected
    alone = sum(map(sum, steps))
    steps.clear()
    assert tokens(batched(model, prompts, max_requests_per_batch=1)) == expected
    assert sum(map(sum, steps)) <= alone - 3 * (len(prefix) - PAGE_SIZE)
    for cache in caches:
        assert_all_free(cache)


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("sharing", [True, False])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_several_answers_to_a_prompt(family: str, sharing: bool, caches: list[PagedAttentionCache]) -> None:
    """A request is forked after its prompt; sampling one of one token, all answers are the greedy one."""
    model = random_model(family)
    expected = [answer for answer in expected_tokens(model, PROMPTS) for _ in range(3)]
    assert tokens(answered(model, PROMPTS, 3, allow_block_sharing=sharing)) == expected
    assert_all_free(caches[0])


def answered(model: Any, prompts: list[list[int]], answers: int, **options: Any) -> list[Any]:
    """The outputs of ``generate_batch()``, several for each prompt, each sampled of one token."""
    sampling = GenerationConfig(
        do_sample=True, top_k=1, num_return_sequences=answers, max_new_tokens=NEW_TOKENS, eos_token_id=2, pad_token_id=0
    )
    outputs = model.generate_batch(
        prompts, generation_config=sampling, continuous_batching_config=configuration(**options), warmup=False
    )
    return list(outputs.values())


@pytest.mark.parametrize("kv_cache_dtype", [None, "int8"], indirect=True)
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_preempted_requests(
    family: str,
    offload: bool,
    kv_cache_dtype: str | None,
    caches: list[PagedAttentionCache],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A cache too small for all: requests lose their pages, are computed again or copied back, and end as eager's."""
    preempted, copied = 0, 0
    manager = offloading_manager.OffloadingManager
    copy_elsewhere = manager._offload_to_cpu

    def count(self: Any, victims: list[Any], tables: Any) -> set[str]:
        nonlocal preempted, copied
        ids = copy_elsewhere(self, victims, tables)
        preempted, copied = preempted + len(victims), copied + len(ids)
        return ids

    monkeypatch.setattr(manager, "_offload_to_cpu", count)
    monkeypatch.setattr(offloading_manager.torch, "empty", without_pinning(torch.empty))
    model = random_model(family)
    prompts = [[5 + i, 7, 11] for i in range(8)]
    options = dict(num_blocks=14 if family == "mistral" else 34, cpu_offload_space=0.01 if offload else 0.0)
    outputs = batched(model, prompts, new_tokens=40, **options)
    assert tokens(outputs) == rounded_tokens(model, prompts, kv_cache_dtype, 40)
    assert preempted > 0 and copied == (preempted if offload else 0)
    assert_all_free(caches[0])


def without_pinning(empty: Any) -> Any:
    """torch.empty on a machine without a GPU, where memory cannot be pinned."""
    return lambda *args, pin_memory=False, **kwargs: empty(*args, **kwargs)


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_cancelled_requests(family: str, caches: list[PagedAttentionCache]) -> None:
    model = random_model(family)
    expected = expected_tokens(model, PROMPTS, 40)
    with model.continuous_batching_context_manager(
        generation_config=greedy(model, 40), continuous_batching_config=configuration(), warmup=False
    ) as manager:
        ids = manager.add_requests(PROMPTS, max_new_tokens=40, streaming=True)
        done: dict[str, list[int]] = {}
        while len(done) < len(PROMPTS) - 1:
            output = manager.get_result(timeout=5)
            assert output is not None and output.error is None
            if output.request_id == ids[1]:
                manager.cancel_request(ids[1])
            elif output.is_finished():
                done[output.request_id] = output.generated_tokens
    assert [done[i] for i in ids if i in done] == [answer for i, answer in zip(ids, expected) if i in done]
    assert_all_free(caches[0])


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_log_probabilities(family: str, gathers: Counter[str]) -> None:
    model = random_model(family)
    ours = batched(model, PROMPTS, return_logprobs=True)
    assert not gathers
    with implementation(model, "sdpa"):
        theirs = batched(model, PROMPTS, return_logprobs=True, auto_switch_to_flash=False)
    gathers.clear()
    assert tokens(ours) == tokens(theirs)
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(torch.tensor(mine.logprobs), torch.tensor(other.logprobs), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("enabled")
def test_requests_longer_than_decoding_was_planned_for() -> None:
    """Tables grow: a request of more pages than ``max_blocks_per_request`` decodes through its table as any other."""
    model = random_model("llama")
    with pagedflash.count_calls() as calls:
        assert tokens(batched(model, PROMPTS, max_blocks_per_request=1)) == expected_tokens(model, PROMPTS)
    assert layouts(calls)["paged"] > layouts(calls)["paged varlen"] > 0


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("path", ["varlen_compile_config", "decode_compile_config"])
def test_compiled_steps(family: str, path: str, request: pytest.FixtureRequest) -> None:
    """Compiled models get padded inputs, as those in CUDA graphs do: rows that are no request, tokens that are none."""
    request.addfinalizer(torch._dynamo.reset)
    model = random_model(family)
    compiling = CompileConfig(backend="eager", fullgraph=False, mode=None, dynamic=True)
    outputs = batched(model, PROMPTS, **{path: compiling}, q_padding_interval_size=16)
    assert tokens(outputs) == expected_tokens(model, PROMPTS)


@pytest.mark.usefixtures("enabled")
def test_a_chunk_that_the_cache_cannot_hold_is_cut(steps: list[list[int]], caches: list[PagedAttentionCache]) -> None:
    """A window needs few pages, a long chunk of a prompt many: where they are not to be had, the chunk is shorter."""
    model = random_model("mistral")
    outputs = batched(model, PROMPTS, num_blocks=6, max_batch_tokens=64)
    assert tokens(outputs) == expected_tokens(model, PROMPTS)
    assert max(map(len, PROMPTS)) > 6 * PAGE_SIZE >= max(map(sum, steps))
    assert_all_free(caches[0])


@pytest.mark.usefixtures("enabled")
def test_tables_are_built_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers get views of what was built for the step, share it, and read nothing on the host."""
    seen: list[engine.StepTables] = []
    attend = engine.paged_attention

    def record(q: Any, k: Any, v: Any, kwargs: Any, **options: Any) -> Any:
        seen.append(kwargs["block_table"])
        with no_host_reads():
            return attend(q, k, v, kwargs, **options)

    monkeypatch.setattr(engine, "paged_attention", record)
    model = random_model("llama")
    batched(model, PROMPTS)
    first, second = seen[::LAYERS], seen[1::LAYERS]
    assert len(seen) > LAYERS and all(a is b for a, b in zip(first, second))
    assert len({tables.block_table.data_ptr() for tables in seen}) == 1, "static storage"
    assert all(tables.block_table.is_contiguous() for tables in seen), "or a copy would be made in each layer"


@contextmanager
def no_host_reads() -> Iterator[None]:
    """What waits for a device to read a tensor on the host raises."""

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert function is not torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    with Mode():
        yield


@pytest.mark.usefixtures("enabled")
def test_inputs_prepared_on_the_host_reach_the_device(steps: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """As asynchronous batching has it: one set of inputs is filled, and transferred to the one that the model sees."""
    transfers = 0
    get_model_kwargs = inputs.PagedInputs.get_model_kwargs

    def transfer(self: Any, use_padding: bool = False) -> Any:
        nonlocal transfers
        if not hasattr(self, "device_inputs"):
            self.device_inputs = ContinuousBatchingIOs(**self.arguments)
        self._transfer_inputs(self.device_inputs, stream=None)
        transfers += 1
        return get_model_kwargs(self.device_inputs, use_padding)

    def initialize(self: Any, **arguments: Any) -> None:
        self.arguments = arguments
        original(self, **arguments)

    original = ContinuousBatchingIOs.__init__
    with monkeypatch.context() as patch:  # undone before disable() undoes what it has replaced
        patch.setattr(ContinuousBatchingIOs, "__init__", initialize)
        patch.setattr(inputs.PagedInputs, "get_model_kwargs", transfer)
        for family in ("llama", "gemma3"):
            model = random_model(family)
            assert tokens(batched(model, PROMPTS, max_blocks_per_request=1)) == expected_tokens(model, PROMPTS)
    assert transfers == len(steps)


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_what_a_graph_captures_is_static(family: str, steps: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """As CUDA graphs have it: a step runs on the tensors of the first step of its shape, filled anew; grown tables too."""
    captured = 0
    initialize, get_model_kwargs = model_runner.ModelRunner.__init__, inputs.PagedInputs.get_model_kwargs

    def pad(self: Any, **arguments: Any) -> None:
        initialize(self, **arguments)
        self.pad_inputs = self.inputs_and_outputs.use_cuda_graph_varlen = True

    def replay(self: Any, use_padding: bool = False) -> Any:
        nonlocal captured
        assert use_padding
        now = get_model_kwargs(self, use_padding)
        graphs = vars(self.graphs).setdefault("captured", {})
        captured += self._get_graph_key() not in graphs
        return graphs.setdefault(self._get_graph_key(), now)

    monkeypatch.setattr(model_runner.ModelRunner, "__init__", pad)
    monkeypatch.setattr(inputs.PagedInputs, "get_model_kwargs", replay)
    model = random_model(family)
    outputs = batched(model, PROMPTS, max_blocks_per_request=4, q_padding_interval_size=8)
    assert tokens(outputs) == expected_tokens(model, PROMPTS)
    assert captured < len(steps) / 2


def places() -> list[dict[str, Any]]:
    """Everything of continuous batching that enable() could touch."""
    owners = (ContinuousBatchingIOs, PagedAttentionCache, FullAttentionCacheAllocator, SlidingAttentionCacheAllocator)
    modules = (gate, cache_module, input_outputs, scheduler_module)
    schedulers = scheduler_module.SCHEDULER_MAPPING.values()
    return [*(dict(vars(owner)) for owner in (*owners, *modules, *schedulers)), dict(cache_module.ATTN_TYPE_TO_ALLOCATOR)]


def rounded_tokens(model: Any, prompts: list[list[int]], name: str | None, new_tokens: int = NEW_TOKENS) -> list[list[int]]:
    """Each prompt alone, by eager attention to what a cache of this format keeps."""
    with rounded_caches(name):
        return expected_tokens(model, prompts, new_tokens)


@pytest.mark.parametrize("kv_cache_dtype", formats.KV_CACHE_DTYPES, indirect=True)
@pytest.mark.parametrize("family", ("llama", "mistral", "gemma3", "gpt-oss"))
def test_pages_of_another_format(
    family: str, kv_cache_dtype: str, caches: list[PagedAttentionCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of float32's bytes, or a quarter and a scale; read and written by kernels alone."""
    attend, dtype = engine.paged_attention, formats.KV_CACHE_DTYPES[kv_cache_dtype]

    def watch(q: Any, k: Any, v: Any, kwargs: Any, **options: Any) -> Any:
        with only_views_of(caches[-1].cache_tensor):
            return attend(q, k, v, kwargs, **options)

    monkeypatch.setattr(engine, "paged_attention", watch)
    model = random_model(family)
    with pagedflash.count_calls() as calls:
        assert tokens(batched(model, PROMPTS)) == rounded_tokens(model, PROMPTS, kv_cache_dtype)
    assert set(layouts(calls)) == {"paged", "paged varlen"}
    (cache,) = caches
    head_bytes = dtype.itemsize * SIZES["head_dim"] + (4 if dtype.itemsize == 1 else 0)
    for allocator in cache.cache_allocators.values():
        layers = len(allocator.layer_indices)
        assert allocator.bytes_per_block == layers * PAGE_SIZE * 2 * SIZES["num_key_value_heads"] * head_bytes
    assert_all_free(cache)


@contextmanager
def only_views_of(memory: torch.Tensor) -> Iterator[None]:
    """Only operators of pagedflash read this memory."""

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            reads = any(isinstance(arg, torch.Tensor) and same(arg) for arg in args)
            assert not reads or function.namespace == "pagedflash" or same(result), f"{function} of the cache"
            return result

    def same(tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()

    with Mode():
        yield


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8_e4m3"], indirect=True)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_scales_go_where_their_pages_go(
    family: str, kv_cache_dtype: str, steps: list[list[int]], caches: list[PagedAttentionCache]
) -> None:
    """Prefixes are shared, and requests forked, with and without sharing."""
    model = random_model(family)
    prefix = list(range(5, 45))
    prompts = [[*prefix, 50 + i, *range(60, 60 + i)] for i in range(4)]
    expected = rounded_tokens(model, prompts, kv_cache_dtype)
    assert tokens(batched(model, prompts, max_requests_per_batch=1)) == expected
    assert sum(map(sum, steps)) < len(prefix) + len(prompts) * (2 * PAGE_SIZE + NEW_TOKENS)
    for sharing in (True, False):
        answers = tokens(answered(model, prompts, 3, allow_block_sharing=sharing))
        assert answers == [answer for answer in expected for _ in range(3)]
    for cache in caches:
        assert_all_free(cache)


def test_a_format_that_pages_cannot_have() -> None:
    with pytest.raises(ValueError, match="kv_cache_dtype is 'int3', expected one of float16, bfloat16, int8, fp8_e4m3"):
        integration.enable(kv_cache_dtype="int3")
    integration.enable()
    with pytest.raises(RuntimeError, match=r"enabled already; call disable\(\) first"):
        integration.enable(kv_cache_dtype="float16")


@pytest.mark.usefixtures("kv_cache_dtype")
@pytest.mark.parametrize("kv_cache_dtype", ["int8"], indirect=True)
def test_a_format_needs_block_tables() -> None:
    model = random_model("llama")
    outputs = model.generate_batch(PROMPTS, continuous_batching_config=configuration(max_blocks_per_request=0), warmup=False)
    for output in outputs.values():
        assert output.error.startswith(
            "pagedflash: kv_cache_dtype is 'int8', but max_blocks_per_request=0 turns block tables off"
        )


def test_a_format_needs_the_places_of_block_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ContinuousBatchingIOs, "_get_num_sequences")
    with pytest.raises(RuntimeError, match=r"kv_cache_dtype is 'int8', but transformers .* prepares its batches elsewhere"):
        integration.enable(kv_cache_dtype="int8")
    assert not integration.is_enabled() and formats.kv_cache_dtype is None


@pytest.mark.parametrize("name", [None, "int8"])
def test_disable_puts_everything_back(name: str | None) -> None:
    before = places()
    integration.enable(kv_cache_dtype=name)
    assert places() != before
    batched(random_model("mistral"), PROMPTS)
    integration.disable()
    assert places() == before


@pytest.mark.usefixtures("enabled")
def test_other_implementations_are_left_alone(caches: list[PagedAttentionCache], gathers: Counter[str]) -> None:
    model = random_model("gemma3", "sdpa")
    assert tokens(batched(model, PROMPTS, auto_switch_to_flash=False)) == expected_tokens(model, PROMPTS)
    assert type(caches[0].cache_allocators["sliding_attention"]) is SlidingAttentionCacheAllocator
    assert gathers and caches[0].max_decode_fast_path_length == 0
    gathers.clear()


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_without_block_tables_transformers_gathers(family: str, gathers: Counter[str]) -> None:
    """max_blocks_per_request=0 is how a user turns them off."""
    model = random_model(family)
    with pagedflash.count_calls() as calls:
        assert tokens(batched(model, PROMPTS, max_blocks_per_request=0)) == expected_tokens(model, PROMPTS)
    assert set(layouts(calls)) == {"varlen"} and gathers
    gathers.clear()


@pytest.mark.parametrize("moved", ["gone", "other parameters", "other update", "other allocators"])
def test_a_version_with_other_places_goes_on_as_it_is(
    moved: str, monkeypatch: pytest.MonkeyPatch, gathers: Counter[str]
) -> None:
    if moved == "gone":
        monkeypatch.delattr(ContinuousBatchingIOs, "_get_num_sequences")
    elif moved == "other parameters":
        monkeypatch.setattr(ContinuousBatchingIOs, "prepare_batch_tensors", lambda self, batch: None)
    elif moved == "other update":
        monkeypatch.setattr(PagedAttentionCache, "update", lambda self, key, value, layer, kwargs: (key, value))
    else:
        monkeypatch.setitem(cache_module.ATTN_TYPE_TO_ALLOCATOR, "sliding_attention", FullAttentionCacheAllocator)
    before = places()
    with pytest.warns(RuntimeWarning, match="prepares its batches elsewhere") as caught:
        integration.enable()
    assert len(caught) == 1 and str(caught[0].message).count(". ") == 0 and caught[0].filename == __file__
    after = places()
    assert [a for a, b in zip(after, before) if a != b] == [vars(gate)]
    monkeypatch.undo()
    model = random_model("llama")
    with pagedflash.count_calls() as calls:
        assert tokens(batched(model, PROMPTS)) == expected_tokens(model, PROMPTS)
    assert set(layouts(calls)) == {"paged", "varlen"}
