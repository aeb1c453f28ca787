"""A mixture of experts from a GGUF file with Q4_K tensors, end to end: eight requests of 128 new tokens each.

``python tests/test_gguf_moe.py FILE.gguf`` writes such a file, for ``pagedflash generate --model FILE.gguf``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("gguf")
pytest.importorskip("libgguf")
pytest.importorskip("transformers")

import gguf
import libgguf
import numpy as np
import torch
from models import enabled, implementation, layouts  # noqa: F401
from transformers.convert_slow_tokenizer import bytes_to_unicode

from pagedflash.cli import generate
from pagedflash.integrations.transformers import engine, hooks

LAYERS, HIDDEN, HEADS, KV_HEADS, EXPERTS, EXPERTS_USED = 2, 256, 4, 2, 4, 2
EXPERT_WIDTH, SHARED_WIDTH = 1408, 5632
"""As in Qwen1.5-MoE-A2.7B: transformers reads neither from a file's header and takes that model's."""

REQUESTS, NEW_TOKENS = 8, 128
MERGES = ("t h", "e r")
TOKENS = [*bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in MERGES), "<|endoftext|>"]
END = len(TOKENS) - 1


def write_model(path: Path) -> None:
    """A random Qwen2-MoE whose tokens are bytes. Matrices in Q4_K where rows are whole blocks, otherwise in Q8_0."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "qwen2moe")
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(SHARED_WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(EXPERTS_USED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.NORMAL] * END + [gguf.TokenType.CONTROL])
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(END)
    writer.add_pad_token_id(END)

    def add_matrix(name: str, *shape: int) -> None:
        values = random.standard_normal(shape, dtype=np.float32) / shape[-1] ** 0.5
        whole_blocks = shape[-1] % libgguf.QK_K == 0
        kind = gguf.GGMLQuantizationType.Q4_K if whole_blocks else gguf.GGMLQuantizationType.Q8_0
        rows = libgguf.quantize_rows(values.reshape(-1, shape[-1]), kind)
        writer.add_tensor(f"{name}.weight", rows.reshape(*shape[:-1], -1), raw_dtype=kind)

    def add_vector(name: str, values: np.ndarray) -> None:
        writer.add_tensor(name, values.astype(np.float32))

    add_matrix("token_embd", len(TOKENS), HIDDEN)
    add_matrix("output", len(TOKENS), HIDDEN)
    add_vector("output_norm.weight", 4 * np.ones(HIDDEN))  # logits far enough apart for rounding not to decide
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        kv_width = HIDDEN // HEADS * KV_HEADS
        for name, width in (("attn_q", HIDDEN), ("attn_k", kv_width), ("attn_v", kv_width)):
            add_matrix(f"{block}.{name}", width, HIDDEN)
            add_vector(f"{block}.{name}.bias", random.standard_normal(width))
        add_matrix(f"{block}.attn_output", HIDDEN, HIDDEN)
        for name in ("attn_norm", "ffn_norm"):
            add_vector(f"{block}.{name}.weight", np.ones(HIDDEN))
        add_vector(f"{block}.ffn_gate_inp.weight", random.standard_normal((EXPERTS, HIDDEN)))
        add_vector(f"{block}.ffn_gate_inp_shexp.weight", random.standard_normal(HIDDEN))
        for name, width, count in (("exps", EXPERT_WIDTH, (EXPERTS,)), ("shexp", SHARED_WIDTH, ())):
            add_matrix(f"{block}.ffn_gate_{name}", *count, width, HIDDEN)
            add_matrix(f"{block}.ffn_up_{name}", *count, width, HIDDEN)
            add_matrix(f"{block}.ffn_down_{name}", *count, HIDDEN, width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.usefixtures("enabled")
def test_eight_requests_of_128_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same tokens as sdpa's, every decoding step through block tables in every layer. Prints the speed of both."""
    write_model(path := tmp_path / "qwen2-moe.Q4_K.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.ffn_gate_exps.weight"] == kinds["blk.1.attn_q.weight"] == "Q4_K"
    loaded = generate.load(generate.find_model(str(path)), torch.device("cpu"), torch.float32, "pagedflash")
    assert loaded.model.config.model_type == "qwen2_moe" and loaded.model.config.num_experts == EXPERTS

    loaded.model.generation_config.eos_token_id = -1  # none ends early
    prompts = [loaded.tokenizer(f"Request {i} " * (i + 1))["input_ids"] for i in range(REQUESTS)]
    ours = generate.generate(loaded, prompts, NEW_TOKENS)
    with implementation(loaded.model, "sdpa"):
        theirs = generate.generate(loaded, prompts, NEW_TOKENS)
    assert [len(tokens) for tokens in ours.tokens] == [NEW_TOKENS] * REQUESTS
    assert len(set().union(*ours.tokens)) > 16, "a model that says more than one thing"
    assert ours.tokens == theirs.tokens

    counts = layouts(ours.calls)
    assert counts["paged"] == LAYERS * (NEW_TOKENS - 1)
    if hooks.version_numbers() >= engine.FIRST_VERSION:
        assert set(counts) == {"paged", "paged varlen"} and counts["paged varlen"] == LAYERS
    assert not theirs.calls
    with capsys.disabled():
        speeds = (f"{run.decode.tokens_per_second:.0f}" for run in (ours, theirs))
        print("\nQwen2-MoE, Q4_K, decode of 8 requests, tokens/s: pagedflash {}, sdpa {}".format(*speeds))


def test_generate_takes_the_file(tmp_path: Path) -> None:
    pytest.importorskip("click")
    from test_cli import run

    write_model(path := tmp_path / "qwen2-moe.Q4_K.gguf")
    arguments = ("--prompt", "To be", "--prompt", "or not", "--max-new-tokens", "8", "--compare", "sdpa")
    result = run("generate", "--model", str(path), *arguments)
    assert result.exit_code == 0, result.output
    assert f"{path.name} on cpu in float32" in result.stdout.splitlines()[0]
    assert f"{LAYERS * 7} x flash_attn_with_kvcache, block table" in result.stdout
    assert "pagedflash beside sdpa: the same texts; " in result.stdout


@pytest.mark.usefixtures("enabled")
def test_serve_takes_the_file(tmp_path: Path) -> None:
    pytest.importorskip("uvicorn")
    from pagedflash.cli import serve

    write_model(path := tmp_path / "qwen2-moe.Q4_K.gguf")
    server = serve._server(f"{tmp_path}:{path.name}", torch.device("cpu"), torch.float32, "localhost", 8000, None)
    ((name, loaded),) = server._model_manager.loaded_models.items()
    assert name.endswith(path.name) and type(loaded.model).__name__ == "Qwen2MoeForCausalLM"
    assert loaded.model.config._attn_implementation == "pagedflash"
    server._model_manager.shutdown()


if __name__ == "__main__":
    write_model(Path(sys.argv[1]))
