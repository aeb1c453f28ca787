"""``pagedflash hub``: the kernel tree, loaded by the real ``kernels`` library, by itself and under transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import pagedflash
from pagedflash.integrations import hub

DROP_IN = "kernels-community/metal-flash-sdpa"
FUNCTIONS = (
    "flash_attention_varlen",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "kv_paged_write",
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hub")
    hub.write(directory)
    return directory


def load(variant: Path) -> ModuleType:
    kernels = pytest.importorskip("kernels")
    return kernels.get_local_kernel(variant)


@pytest.fixture(scope="module")
def kernel(tree: Path) -> ModuleType:
    return load(tree)


def packed(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys, values and offsets of sequences of 3, 0 and 6 tokens."""
    torch.manual_seed(seed)
    q, k, v = torch.randn(9, 4, 32), torch.randn(9, 2, 32), torch.randn(9, 2, 32)
    return q, k, v, torch.tensor([0, 3, 3, 9], dtype=torch.int32)


@pytest.mark.parametrize("kind", hub.VARIANTS)
def test_the_kernels_library_reads_metadata_and_confirms_digests(tree: Path, kind: str) -> None:
    rust = pytest.importorskip("kernels._rust")
    folder = tree / "build" / f"torch-{kind}"
    metadata = rust.Metadata.read_from_file(folder / "metadata.json")
    assert metadata.id.isidentifier() and kind in metadata.id
    assert (str(metadata.name), metadata.version, metadata.license) == ("pagedflash", 1, "Apache-2.0")
    assert str(metadata.backend.backend_type).lower().endswith(kind) and metadata.python_depends == []
    metadata.digest.validate(rust.Digest.hash_variant(metadata.digest.algorithm, folder))


@pytest.mark.parametrize("kind", hub.VARIANTS)
def test_a_variant_holds_its_backend_and_no_other(tree: Path, kind: str) -> None:
    files = {path.relative_to(tree / "build" / f"torch-{kind}").as_posix() for path in tree.rglob(f"torch-{kind}/**/*")}
    backends = {name.split("/")[1] for name in files if name.startswith("backends/") and name.count("/") > 1}
    assert backends == {hub.VARIANTS[kind]}
    assert ("backends/metal/kernels/decode.metal" in files) == (kind == "metal")
    assert ("backends/triton/kernels/decode.py" in files) == (kind == "cuda")
    assert not any("native" in name or "__pycache__" in name for name in files)


@pytest.mark.parametrize("kind", hub.VARIANTS)
@pytest.mark.filterwarnings("ignore:pagedflash. the slow reference:RuntimeWarning")
def test_every_variant_loads_and_computes_beside_the_installed_package(tree: Path, kind: str) -> None:
    """Not on its own device here: then the reference runs."""
    module = load(tree / "build" / f"torch-{kind}")
    q, k, v, cu = packed()
    with module.count_calls() as its_calls, pagedflash.count_calls() as our_calls:
        out = module.flash_attn_varlen_func(q, k, v, cu, cu, 6, 6, causal=True)
    assert sum(its_calls.values()) == 1 and not our_calls
    torch.testing.assert_close(out, pagedflash.flash_attn_varlen_func(q, k, v, cu, cu, 6, 6, causal=True))


def test_the_cpu_variant_takes_the_native_library_along(kernel: ModuleType) -> None:
    assert kernel.availability()["cpu"] == pagedflash.availability()["cpu"]


def test_it_exports_the_functions_of_both(kernel: ModuleType) -> None:
    assert set(FUNCTIONS) <= set(kernel.__all__) and all(callable(getattr(kernel, name)) for name in FUNCTIONS)
    assert not hasattr(pagedflash, "flash_attention_varlen")


@pytest.mark.parametrize("softcapping, softcap", [(1.0, 0.0), (0.5, 0.5), (30.0, 30.0)])
def test_flash_attention_varlen_writes_into_out(kernel: ModuleType, softcapping: float, softcap: float) -> None:
    q, k, v, cu = packed()
    out = torch.full_like(q, float("nan"))
    assert kernel.flash_attention_varlen(out, q, k, v, cu, cu, 6, 6, True, 0.3, softcapping) is None
    expected = pagedflash.flash_attn_varlen_func(q, k, v, cu, cu, 6, 6, softmax_scale=0.3, causal=True, softcap=softcap)
    torch.testing.assert_close(out, expected)


def test_flash_attention_varlen_by_default_sees_all_and_scales_by_head_dim(kernel: ModuleType) -> None:
    q, k, v, cu = packed()
    out = torch.empty_like(q)
    kernel.flash_attention_varlen(out, q, k, v, cu, cu, 6, 6)
    torch.testing.assert_close(out, pagedflash.flash_attn_varlen_func(q, k, v, cu, cu, 6, 6))


@pytest.mark.parametrize(
    "out, error",
    [
        (torch.full((9, 4, 16), 7.0), ValueError),
        (torch.full((8, 4, 32), 7.0), ValueError),
        (torch.full((9, 4, 32), 7.0, dtype=torch.float16), TypeError),
        (None, TypeError),
    ],
)
def test_a_wrong_out_is_refused_untouched(kernel: ModuleType, out: Any, error: type[Exception]) -> None:
    q, k, v, cu = packed()
    with pytest.raises(error, match="out is of"):
        kernel.flash_attention_varlen(out, q, k, v, cu, cu, 6, 6)
    assert out is None or (out == 7).all()


def test_written_again_it_is_the_same_and_another_kernel_stays(tmp_path: Path) -> None:
    hub.write(tmp_path)
    first = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    (tmp_path / "build/torch-cpu/left_behind.py").write_text("")
    hub.write(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == first

    metadata = tmp_path / "build/torch-metal/metadata.json"
    metadata.write_text(json.dumps({"name": "somebody-elses"}))
    with pytest.raises(hub.HubError, match="is not a pagedflash kernel"):
        hub.write(tmp_path)
    assert (tmp_path / "build/torch-cpu/interface.py").exists()
    with pytest.raises(hub.HubError, match="is not a directory"):
        hub.write(metadata)


ALONE = """
import sys
sys.modules["pagedflash"] = None  # as if it were not installed
import torch
from kernels import get_loaded_kernels
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
model = LlamaForCausalLM._from_config(config, attn_implementation="kernels-community/metal-flash-sdpa").eval()
ids = torch.arange(1, 17).view(2, 8)
mask = torch.tensor([[0] * 3 + [1] * 5, [1] * 8])
(loaded,) = get_loaded_kernels()
with torch.no_grad(), loaded.module.count_calls() as calls:
    logits = model(ids, attention_mask=mask).logits
assert [kind.layout for kind in calls] == ["varlen"], calls
model.set_attn_implementation("eager")
with torch.no_grad():
    torch.testing.assert_close(logits[mask.bool()], model(ids, attention_mask=mask).logits[mask.bool()])
"""


def test_it_serves_transformers_alone_in_a_fresh_process(tree: Path) -> None:
    pytest.importorskip("kernels")
    pytest.importorskip("transformers")
    environment = {**os.environ, "LOCAL_KERNELS": f"{DROP_IN}={tree}", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", ALONE], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_smollm2_generates_through_it_and_enable_opens_block_tables(
    tree: Path, kernel: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place of the kernel of that name, from the tree: varlen by itself, block tables once asked for."""
    pytest.importorskip("transformers")
    from models import batched, implementation, layouts, padded, smollm2

    import pagedflash.transformers
    from pagedflash.cli import generate

    monkeypatch.setenv("LOCAL_KERNELS", f"{DROP_IN}={tree}")
    model, tokenizer = smollm2()
    prompts = generate.encode(tokenizer, ["Say yes.", "Name three colours of the rainbow."])
    expected = padded(model, prompts, 8)
    sizes: dict[str, Any] = dict(max_new_tokens=8, page_size=32, num_blocks=8)
    with implementation(model, DROP_IN), pagedflash.count_calls() as our_calls:
        with kernel.count_calls() as calls:
            assert padded(model, prompts, 8) == expected
            assert batched(model, prompts, **sizes) == expected
        assert set(layouts(calls)) == {"varlen"}

        pagedflash.transformers.enable(decode_fast_path_for=[DROP_IN])
        try:
            with kernel.count_calls() as calls:
                assert batched(model, prompts, **sizes) == expected
        finally:
            pagedflash.transformers.disable()
        assert set(layouts(calls)) == {"varlen", "paged"}
        with kernel.count_calls() as calls:
            assert batched(model, prompts, **sizes) == expected
        assert set(layouts(calls)) == {"varlen"}
    assert not our_calls
