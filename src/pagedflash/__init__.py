"""pagedflash: the flash-attn interface with a paged KV cache, on Apple GPUs, CPUs and CUDA.

See the functions' docstrings for shapes and semantics, :mod:`pagedflash.transformers` for Hugging Face transformers.
"""

from .dispatch import CallKind, availability, count_calls, use_backend
from .interface import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    kv_paged_write,
    merge_attention_states,
)
from .qkvpacked import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

__version__ = "0.1.0"

__all__ = [
    "CallKind",
    "availability",
    "count_calls",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "kv_paged_write",
    "merge_attention_states",
    "use_backend",
]
