#!/bin/sh
# The CPU backend's tests with all C++ under the address and undefined-behaviour sanitizers (GCC or Clang, Linux).
#
#   tests/sanitize.sh [pytest arguments]
#   tests/sanitize.sh --build     only builds it, for which no Python is needed
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
build=$root/build/sanitize
python=${PYTHON:-python}

mkdir -p "$root/build"
cmake -S "$root" -B "$build" -DPAGEDFLASH_SANITIZE=ON >"$build.log" 2>&1 || { cat "$build.log"; exit 1; }
cmake --build "$build" --parallel 2
[ "${1:-}" != --build ] || exit 0
# Python itself is not instrumented: the runtime must be there before it, and its own leaks are none of ours. With it comes
# the C++ library, without which it cannot pass on what torch throws.
runtime=$(${CXX:-c++} -print-file-name=libasan.so):$(${CXX:-c++} -print-file-name=libstdc++.so)
export LD_PRELOAD="$runtime${LD_PRELOAD:+:$LD_PRELOAD}"
export ASAN_OPTIONS=detect_leaks=0
export UBSAN_OPTIONS=print_stacktrace=1
export PAGEDFLASH_CPU_LIBRARY=$build/libpagedflash_cpu.so
export PAGEDFLASH_SIGNATURE_LIBRARY=$build/libpagedflash_signature.so
export PAGEDFLASH_REQUIRE_NATIVE=1
# Not in a process that has little memory, which the sanitizer needs too, or a cache of 2^32 elements, which it would fill.
file=tests/test_cpu_backend.py
cd "$root"
exec "$python" -m pytest tests/test_signature.py "$file" --deselect "$file::test_offsets_of_more_than_32_bits" \
  --deselect "$file::test_running_out_of_memory_is_said_before_anything_is_written" \
  --deselect "$file::test_the_memory_of_a_backward_pass_grows_with_the_length" "$@"
