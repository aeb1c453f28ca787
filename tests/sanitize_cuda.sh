#!/bin/sh
# On a GPU under compute-sanitizer: no kernel touches memory outside of its tensors, whatever lengths, offsets and table entries
# are, wherever rows begin, and with several queries of quantized keys.
#
#   tests/sanitize_cuda.sh [pytest arguments]
set -eu
cd "$(dirname "$0")/.."
# Errors of the driver's own functions are not counted: a launch asks for a kernel's parameters until there is none.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1  # each tensor is an allocation of its own
exec compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 1 "${PYTHON:-python}" -m pytest --device cuda -q \
  tests/test_cuda_wrong_calls.py tests/test_triton_backend.py -k "wrong or do_not_begin or several_queries" "$@"
