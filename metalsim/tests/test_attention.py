"""Two kernels as they are written for Apple GPUs: vector attention with simd_sum, a tiled matmul with matrices."""

from __future__ import annotations

import time

import pytest
import torch

import metalsim

DTYPES = {"float": torch.float32, "half": torch.float16, "bfloat": torch.bfloat16}
TOLERANCE = {"float": 2e-6, "half": 1e-3, "bfloat": 8e-3}

ATTENTION = """
#include <metal_stdlib>
using namespace metal;

// One threadgroup for each (head, sequence): simdgroups take keys in turn, lanes take parts of a head; the simdgroups'
// partial results meet in threadgroup memory.
template <typename T, int D, int SIMDGROUPS>
[[kernel]] void attention(
    device const T* q [[buffer(0)]],
    device const T* k [[buffer(1)]],
    device const T* v [[buffer(2)]],
    device T* out [[buffer(3)]],
    constant int& keys [[buffer(4)]],
    constant float& scale [[buffer(5)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint3 groups [[threadgroups_per_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  constexpr int PART = D / 32;
  typedef float U;
  threadgroup U partial[SIMDGROUPS * D];
  threadgroup U maxima[SIMDGROUPS];
  threadgroup U sums[SIMDGROUPS];

  const size_t row = (group.y * groups.x + group.x) * D + lane * PART;
  thread U query[PART];
  thread U o[PART];
  for (int i = 0; i < PART; i++) {
    query[i] = static_cast<U>(scale) * M_LOG2E_F * q[row + i];
    o[i] = 0;
  }

  U max_score = -INFINITY;
  U sum = 0;
  for (int key = simdgroup; key < keys; key += SIMDGROUPS) {
    const size_t at = ((group.y * keys + key) * groups.x + group.x) * D + lane * PART;
    U score = 0;
    for (int i = 0; i < PART; i++) score += query[i] * U(k[at + i]);
    score = simd_sum(score);
    const U new_max = max(max_score, score);
    const U factor = fast::exp2(max_score - new_max);
    const U weight = fast::exp2(score - new_max);
    max_score = new_max;
    sum = sum * factor + weight;
    for (int i = 0; i < PART; i++) o[i] = o[i] * factor + weight * U(v[at + i]);
  }

  for (int i = 0; i < PART; i++) partial[simdgroup * D + lane * PART + i] = o[i];
  if (lane == 0) {
    maxima[simdgroup] = max_score;
    sums[simdgroup] = sum;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup != 0) return;
  const U best = simd_max(lane < SIMDGROUPS ? maxima[lane] : -INFINITY);
  const U total = simd_sum(lane < SIMDGROUPS ? sums[lane] * fast::exp2(maxima[lane] - best) : 0.0f);
  for (int i = 0; i < PART; i++) {
    U combined = 0;
    for (int s = 0; s < SIMDGROUPS; s++) combined += partial[s * D + lane * PART + i] * fast::exp2(maxima[s] - best);
    out[row + i] = static_cast<T>(combined / total);
  }
}

#define instantiate(T, D)                                        \\
  template [[host_name("attention_" #T "_" #D)]] [[kernel]]      \\
      decltype(attention<T, D, 4>) attention<T, D, 4>;
instantiate(float, 128)
instantiate(half, 128)
instantiate(bfloat, 128)
instantiate(half, 64)
"""


def attend(kind: str, head_dim: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    out = torch.full_like(q, torch.nan)
    kernel = getattr(metalsim.compile_shader(ATTENTION), f"attention_{kind}_{head_dim}")
    batch, heads, _ = q.shape
    kernel(
        q, k, v, out, k.shape[1], head_dim**-0.5,
        threads=(heads * 128, batch, 1), group_size=(128, 1, 1), arg_casts={4: "int32"},
    )  # fmt: skip
    return out


def inputs(kind: str, batch: int, heads: int, keys: int, head_dim: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, heads, head_dim), (batch, keys, heads, head_dim), (batch, keys, heads, head_dim)]
    return [torch.randn(s, generator=generator).to(DTYPES[kind]) for s in shapes]


def expected(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    attention = torch.nn.functional.scaled_dot_product_attention
    return attention(q.double()[:, :, None], k.double().transpose(1, 2), v.double().transpose(1, 2))[:, :, 0].float()


@pytest.mark.parametrize("kind, head_dim", [("float", 128), ("half", 128), ("bfloat", 128), ("half", 64)])
def test_vector_attention_in_every_order(kind: str, head_dim: int) -> None:
    q, k, v = inputs(kind, 2, 3, 13, head_dim)
    (out,) = metalsim.in_every_order(lambda: [attend(kind, head_dim, q, k, v)])
    torch.testing.assert_close(out.float(), expected(q, k, v), rtol=TOLERANCE[kind], atol=TOLERANCE[kind])


def test_vector_attention_counters() -> None:
    """K and V are each read once, in full lines; one simd_sum for a key, two for the reduction."""
    batch, heads, keys, head_dim = 2, 3, 13, 128
    q, k, v = inputs("float", batch, heads, keys, head_dim)
    with metalsim.simulate() as run:
        attend("float", head_dim, q, k, v)
    c = run.dispatches[0].counters
    query_reads = 4 * q.nbytes  # by each of four simdgroups
    assert c.unique_bytes_loaded == k.nbytes + v.nbytes + query_reads
    assert c.device_bytes_stored == q.nbytes
    assert c.simd_operations == batch * heads * (keys + 2)
    assert c.threadgroup_barriers == batch * heads
    # scalar loads, four floats apart: each instruction uses a quarter of the lines it touches
    assert c.load_efficiency == 0.25
    assert run.dispatches[0].threadgroup_bytes == (4 * head_dim + 8) * 4


def test_a_small_decode_takes_milliseconds() -> None:
    q, k, v = inputs("half", 4, 16, 50, 128)
    attend("half", 128, q, k, v)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        out = attend("half", 128, q, k, v)
        times.append(time.perf_counter() - start)
    torch.testing.assert_close(out.float(), expected(q, k, v), rtol=1e-3, atol=1e-3)
    assert min(times) < 0.05


MATMUL = """
#include <metal_stdlib>
#include <metal_simdgroup_matrix>
using namespace metal;

// C = A B: a threadgroup of 2 x 2 simdgroups computes 32 x 32 of C, each simdgroup 16 x 16 as 2 x 2 matrices. Tiles of
// A and B go through threadgroup memory, whose rows are padded by 16 bytes.
template <typename T>
[[kernel]] void matmul(
    const device T* a [[buffer(0)]],
    const device T* b [[buffer(1)]],
    device T* c [[buffer(2)]],
    constant int4& mnk [[buffer(3)]],
    uint2 tile [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  constexpr int BLOCK = 32, K_BLOCK = 16, PAD = 16 / sizeof(T);
  constexpr int A_ROW = K_BLOCK + PAD, B_ROW = BLOCK + PAD;
  threadgroup T as[BLOCK * A_ROW];
  threadgroup T bs[K_BLOCK * B_ROW];
  const int n = mnk.y, k = mnk.z;
  const int row = (simdgroup / 2) * 16, column = (simdgroup % 2) * 16;

  simdgroup_matrix<float, 8, 8> sums[2][2];
  for (int i = 0; i < 4; i++) sums[i / 2][i % 2] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  for (int at = 0; at < k; at += K_BLOCK) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = thread_index; i < BLOCK * K_BLOCK; i += 128) {
      as[i / K_BLOCK * A_ROW + i % K_BLOCK] = a[(tile.y * BLOCK + i / K_BLOCK) * k + at + i % K_BLOCK];
      bs[i / BLOCK * B_ROW + i % BLOCK] = b[(at + i / BLOCK) * n + tile.x * BLOCK + i % BLOCK];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int step = 0; step < K_BLOCK; step += 8) {
      simdgroup_matrix<T, 8, 8> left[2], right[2];
      for (int i = 0; i < 2; i++) {
        simdgroup_load(left[i], as + (row + 8 * i) * A_ROW + step, A_ROW);
        simdgroup_load(right[i], bs + step * B_ROW + column + 8 * i, B_ROW);
      }
      for (int i = 0; i < 2; i++)
        for (int j = 0; j < 2; j++) simdgroup_multiply_accumulate(sums[i][j], left[i], right[j], sums[i][j]);
    }
  }
  for (int i = 0; i < 2; i++)
    for (int j = 0; j < 2; j++) {
      simdgroup_matrix<T, 8, 8> result;
      result.thread_elements() = vec<T, 2>(sums[i][j].thread_elements());
      simdgroup_store(result, c + (tile.y * BLOCK + row + 8 * i) * n + tile.x * BLOCK + column + 8 * j, n);
    }
}
template [[host_name("matmul_float")]] [[kernel]] decltype(matmul<float>) matmul<float>;
template [[host_name("matmul_half")]] [[kernel]] decltype(matmul<half>) matmul<half>;
template [[host_name("matmul_bfloat")]] [[kernel]] decltype(matmul<bfloat>) matmul<bfloat>;
"""


@pytest.mark.parametrize("kind", DTYPES)
def test_tiled_matmul_in_every_order(kind: str) -> None:
    m, n, k = 64, 96, 48
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(m, k, generator=generator).to(DTYPES[kind])
    b = torch.randn(k, n, generator=generator).to(DTYPES[kind])
    kernel = getattr(metalsim.compile_shader(MATMUL), f"matmul_{kind}")

    def multiply() -> list[torch.Tensor]:
        c = torch.full((m, n), torch.nan, dtype=DTYPES[kind])
        kernel(a, b, c, [m, n, k, 0], threads=(n // 32 * 128, m // 32), group_size=(128, 1), arg_casts="int32")
        return [c]

    (c,) = metalsim.in_every_order(multiply)
    scale = k**0.5
    torch.testing.assert_close(c.float() / scale, a.float() @ b.float() / scale, rtol=TOLERANCE[kind], atol=TOLERANCE[kind])
    with metalsim.simulate() as run:
        multiply()
    assert run.dispatches[0].counters.matrix_multiplies == m * n * k // 512


def test_matrix_constructors_transposes_and_origins() -> None:
    source = """
    #include <metal_stdlib>
    using namespace metal;
    kernel void f(device const float* x [[buffer(0)]], device float* y [[buffer(1)]]) {
        simdgroup_float8x8 m, product, diagonal = simdgroup_float8x8(2.0f);
        simdgroup_load(m, x, 16, ulong2(8, 4));
        simdgroup_store(m, y, 8);
        simdgroup_load(m, x, 16, ulong2(0, 0), true);
        simdgroup_store(m, y + 64, 8);
        simdgroup_store(m, y + 128, 8, ulong2(0, 0), true);
        simdgroup_multiply(product, m, diagonal);
        simdgroup_store(product, y + 192, 8);
        simdgroup_store(make_filled_simdgroup_matrix<float, 8, 8>(3.0f), y + 256, 8);
    }"""
    x = torch.arange(256.0).view(16, 16)
    y = torch.zeros(5, 8, 8)
    with metalsim.simulate():
        metalsim.compile_shader(source).f(x, y, threads=32, group_size=32)
    corner = x[:8, :8]
    assert torch.equal(y, torch.stack([x[4:12, 8:], corner.T, corner, 2 * corner.T, torch.full((8, 8), 3.0)]))
