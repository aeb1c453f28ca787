"""Wrong calls on a GPU, where lengths and table entries are not checked: none may touch memory outside of its tensors.

With ``--device cuda``. tests/sanitize_cuda.sh runs them under compute-sanitizer, each tensor an allocation of its own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_errors import PAIRS, VALID

MARGIN = 1 << 14
"""Elements in front of a cache and behind it."""


@pytest.fixture(autouse=True)
def needs_a_gpu(device: str) -> None:
    if device != "cuda":
        pytest.skip("needs a GPU")


def surrounded(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy on the GPU, and the memory it lies in."""
    memory = torch.full((tensor.numel() + 2 * MARGIN,), 77, dtype=tensor.dtype, device="cuda")
    copy = memory[MARGIN : MARGIN + tensor.numel()].view(tensor.shape)
    return copy.copy_(tensor), memory


def on_gpu(value: Any) -> Any:
    return value.cuda() if isinstance(value, torch.Tensor) and value.device.type == "cpu" else value


def arguments_of(build: Any) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """Of a right call, and the memory of its caches."""
    arguments, memories = build(2, 2, 32, torch.float32), []
    for name, value in arguments.items():
        if name.endswith("_cache"):
            arguments[name], memory = surrounded(value)
            memories.append(memory)
        else:
            arguments[name] = on_gpu(value)
    return arguments, memories


def test_none_leaves_its_tensors() -> None:
    """Nor a fault behind: the next right call gives what it gave before."""
    ran = 0
    for where, wrong in PAIRS:
        function, build = VALID[where]
        arguments, memories = arguments_of(build)
        arguments[wrong.argument] = on_gpu(wrong.spoil(arguments.get(wrong.argument)))
        try:
            function(**arguments)
            ran += 1
        except (ValueError, TypeError):
            pass
        torch.cuda.synchronize()
        for memory in memories:
            assert (memory[:MARGIN] == 77).all() and (memory[-MARGIN:] == 77).all(), (where, wrong)
    assert ran > 10, "the premise: values are not checked"
    for function, build in VALID.values():
        function(**arguments_of(build)[0])
    torch.cuda.synchronize()


def test_all_are_rejected_where_values_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEDFLASH_CHECK", "1")
    for where, wrong in PAIRS:
        function, build = VALID[where]
        arguments, _ = arguments_of(build)
        arguments[wrong.argument] = on_gpu(wrong.spoil(arguments.get(wrong.argument)))
        with pytest.raises((ValueError, TypeError), match="pagedflash: "):
            function(**arguments)
            pytest.fail(f"accepted: {where} {wrong}")
