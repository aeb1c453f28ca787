"""The backends: one package per device, each with the same four kernels (kv_write, decode, combine, prefill)."""
