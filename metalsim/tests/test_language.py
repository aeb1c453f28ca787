"""The language: vectors, conversions, literals, math, templates, structures, atomics, threadgroup memory."""

from __future__ import annotations

import math

import pytest
import torch

import metalsim

HEADER = "#include <metal_stdlib>\nusing namespace metal;\n"


def value(expression: str, before: str = "") -> float:
    """A scalar expression, computed by one thread."""
    source = HEADER + f"{before}\nkernel void f(device float* y [[buffer(0)]]) {{ y[0] = float({expression}); }}"
    y = torch.zeros(1)
    metalsim.compile_shader(source).f(y, threads=1, group_size=1)
    return y.item()


# One library computes all of these: expression -> value.
EXPRESSIONS = {
    # constructors and conversions
    "float4(1, 2, 3, 4).w": 4,
    "float4(float2(1, 2), 3, 4).y": 2,
    "float4(1, float3(2, 3, 4)).z": 3,
    "float4(7).z": 7,
    "int4(float4(1.9f, -1.9f, 3, 4)).x + int4(float4(1.9f, -1.9f, 3, 4)).y": 0,
    "float4(half4(float4(0.1f))).x": float(torch.tensor(0.1).half()),
    "float(half2(bfloat2(float2(0.1f))).y)": float(torch.tensor(0.1).bfloat16()),
    "(half4(1) + half4(2)).w": 3,
    "static_cast<int>(2.7f)": 2,
    "static_cast<float2>(int2(3, 4)).y": 4,
    "(float)7 / 2": 3.5,
    "((float2)int2(5, 6)).y": 6,
    "vec<half, 4>(float4(3)).x": 3,
    "metal::float3(1, 2, 3).z": 3,
    "uchar4(1, 2, 3, 255).w": 255,
    "as_type<int>(1.0f) == 0x3f800000": 1,
    "as_type<half2>(0x40003c00).y": 2,
    "as_type<ushort>(bfloat(1.0f)) == 0x3f80": 1,
    # swizzles
    "float4(1, 2, 3, 4).wzyx.x": 4,
    "float4(1, 2, 3, 4).rgba.g": 2,
    "swizzled().x * 1000 + swizzled().y * 100 + swizzled().z * 10 + swizzled().w": 1432,
    # literals are float, halves round at every operation
    "1.0 / 3.0 == 1.0f / 3.0f": 1,
    "sizeof(1.0) + sizeof(1e3) + sizeof(2.h) + sizeof(1.5bf)": 12,
    "half(2048) + half(1) - half(2048)": 0,
    "bfloat(256) + bfloat(1) - bfloat(256)": 0,
    "half(0.1f) * 3.0": 3 * float(torch.tensor(0.1).half()),
    # math
    "exp2(3.0f)": 8,
    "fast::exp2(-1.0f) + precise::exp(0.0f)": 1.5,
    "rsqrt(4.0f)": 0.5,
    "fma(2.0f, 3.0f, 4.0f)": 10,
    "clamp(5.0f, 0.0f, 1.0f) + clamp(-2, -1, 1)": 0,
    "max(1.0f, NAN) + min(NAN, 2.0f)": 3,
    "max(half(1), half(2)) + min(3, 4)": 5,
    "max(float2(1, 5), 3.0f).x + max(float2(1, 5), float2(3)).y": 8,
    "select(1.0f, 2.0f, true)": 2,
    "select(float2(1), float2(2), float2(3, 5) < float2(4)).x": 2,
    "any(float2(1, 2) > 1.5f) + all(float2(1, 2) > 1.5f)": 1,
    "isnan(NAN) + isinf(-INFINITY) + isfinite(1.0f) + signbit(-0.0f)": 4,
    "abs(-3) + abs(-2.5f) + fabs(half(-0.5f))": 6,
    "floor(-1.5f) + ceil(1.2f) + round(2.5f) + rint(2.5f) + trunc(-1.7f) + fract(1.25f)": 4.25,
    "dot(float3(1, 2, 3), float3(4, 5, 6)) + length(float2(3, 4))": 37,
    "cross(float3(1, 0, 0), float3(0, 1, 0)).z": 1,
    "mix(1.0f, 3.0f, 0.5f) + step(1.0f, 2.0f) + sign(-4.0f) + saturate(7.0f)": 3,
    "pow(2.0f, 3)": 8,
    "tanh(0.5f)": math.tanh(0.5),
    "atan2(1.0f, 1.0f)": math.pi / 4,
    "log(M_E_F) + log2(8.0f) + log10(100.0f)": 6,
    "sin(M_PI_F / 6) + cos(M_PI_F / 3)": 1,
    "popcount(7u) + clz(1u) + ctz(8u)": 37,
    "rotate(1u, 33u) + extract_bits(0xf0u, 4u, 4u) + mulhi(0x80000000u, 4u)": 19,
    "numeric_limits<half>::max()": 65504,
    "numeric_limits<float>::lowest() == -FLT_MAX": 1,
    "is_same_v<vec<half, 4>, half4> + is_same_v<float, half>": 1,
    # integers
    "uint(-1) == 4294967295u": 1,
    "long(1) << 40 == 1099511627776": 1,
    "sizeof(ulong) * 10 + sizeof(packed_float3) + sizeof(float3)": 108,
    "7 / 2 + 7 % 3": 4,
}


@pytest.fixture(scope="module")
def computed() -> dict[str, float]:
    lines = "\n".join(f"y[{i}] = float({e});" for i, e in enumerate(EXPRESSIONS))
    source = (
        HEADER
        + "float4 swizzled() { float4 v = float4(1, 2, 3, 4); v.yz = v.wz; v.w = 2; return v; }\n"
        + f"kernel void f(device float* y [[buffer(0)]]) {{ {lines} }}"
    )
    y = torch.zeros(len(EXPRESSIONS))
    metalsim.compile_shader(source).f(y, threads=1, group_size=1)
    return dict(zip(EXPRESSIONS, y.tolist(), strict=True))


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expression(expression: str, computed: dict[str, float]) -> None:
    assert computed[expression] == pytest.approx(EXPRESSIONS[expression], rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    "expression, says",
    [
        ("sqrt(2)", "call to 'sqrt' is ambiguous"),
        ("max(1, 2u)", "call to 'max' is ambiguous"),
        ("max(1.0f, half(2))", "call to 'max' is ambiguous"),
        ("(half4(1) + float4(1)).x", "cannot convert|invalid operands"),
        ("as_type<half>(1.0f)", "as_type between types of different sizes"),
    ],
)
def test_what_metal_finds_ambiguous_or_wrong(expression: str, says: str) -> None:
    with pytest.raises(metalsim.CompileError, match=says):
        value(expression)


def test_structures_templates_and_references() -> None:
    before = """
    template <typename T, int N> struct Rows {
        using Row = vec<T, N>;
        Row rows[2];
        static constexpr int size() { return N; }
        thread Row& operator[](int i) { return rows[i]; }
        template <typename U> U sum() const {
            U s = 0;
            for (int i = 0; i < N; ++i) s += U(rows[0][i] + rows[1][i]);
            return s;
        }
    };
    struct Pair { int a; float b; };
    enum class Mode : ushort { one = 1, two = 2 };
    template <Mode mode> int times(int x) { if constexpr (mode == Mode::two) return 2 * x; else return x; }
    void bump(thread Pair& p, thread float* q) { p.a += 1; *q += p.b; }
    float all_of_it() {
        Rows<half, 4> r;
        r[0] = Rows<half, 4>::Row(1);
        r[1] = half4(2);
        Pair p = {3, 0.5f};
        float q = 1;
        bump(p, &q);
        auto add = [&](int i) { return i + p.a; };
        return r.sum<float>() + times<Mode::two>(add(1)) + q + r.size();
    }
    """
    assert value("all_of_it()", before) == 12 + 10 + 1.5 + 4


@pytest.mark.parametrize("check", [False, True])
def test_packed_types_in_memory(check: bool) -> None:
    source = (
        HEADER
        + """
    struct Item { packed_float3 position; float mass; };
    kernel void f(device Item* items [[buffer(0)]], device packed_half2* out [[buffer(1)]],
                  uint i [[thread_position_in_grid]]) {
        float3 p = items[i].position;
        items[i].position = packed_float3(p * 2 + items[i].mass);
        out[i] = packed_half2(half2(p.xy));
    }"""
    )
    items, out = torch.arange(20.0).view(5, 4), torch.zeros(5, 2, dtype=torch.float16)
    expected = items.clone()
    expected[:, :3] = items[:, :3] * 2 + items[:, 3:]
    pairs = items[:, :2].half()
    with metalsim.simulate(check=check):
        metalsim.compile_shader(source).f(items, out, threads=5)
    assert torch.equal(items, expected) and torch.equal(out, pairs)


@pytest.mark.parametrize("check", [False, True])
def test_atomics(check: bool) -> None:
    source = (
        HEADER
        + """
    kernel void f(device atomic_uint* count [[buffer(0)]], device atomic_int* most [[buffer(1)]],
                  device atomic_float* sum [[buffer(2)]], device uint* per_group [[buffer(3)]],
                  uint i [[thread_position_in_grid]], uint t [[thread_index_in_threadgroup]],
                  uint g [[threadgroup_position_in_grid]]) {
        threadgroup atomic_uint local[2];
        if (t < 2) atomic_store_explicit(&local[t], 0u, memory_order_relaxed);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        atomic_fetch_add_explicit(&local[i % 2], i, memory_order_relaxed);
        atomic_fetch_add_explicit(count, 1u, memory_order_relaxed);
        atomic_fetch_max_explicit(most, int(i * 7 % 50), memory_order_relaxed);
        float old = atomic_load_explicit(sum, memory_order_relaxed);
        while (!atomic_compare_exchange_weak_explicit(sum, &old, old + 0.5f, memory_order_relaxed, memory_order_relaxed)) {}
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (t < 2) per_group[g * 2 + t] = atomic_exchange_explicit(&local[t], 0u, memory_order_relaxed);
    }"""
    )
    f = metalsim.compile_shader(source).f
    for order in metalsim.ORDERS:
        count, most, total = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), torch.zeros(1)
        per_group = torch.zeros(2, 2, dtype=torch.int32)
        with metalsim.simulate(check=check, order=order):
            f(count, most, total, per_group, threads=200, group_size=100)
        assert (count.item(), most.item(), total.item()) == (200, 49, 100)
        i = torch.arange(200).view(2, 50, 2)
        assert torch.equal(per_group.long(), i.sum(1))


@pytest.mark.parametrize("check", [False, True])
def test_threadgroup_variables(check: bool) -> None:
    """Arrays of arrays, several in one declaration, aligned ones, structures, in templates, reused by every threadgroup."""
    source = (
        HEADER
        + """
    struct Entry { int key; float value; };
    constant constexpr int kWide = 8;
    template <typename T, int N>
    kernel void f(device T* x [[buffer(0)]], uint t [[thread_index_in_threadgroup]], uint i [[thread_position_in_grid]]) {
        threadgroup T grid[N][kWide + 1], line[N * kWide], last;
        alignas(16) threadgroup half wide[N * 8];
        threadgroup Entry entries[64];
        threadgroup vec<T, 4> vectors[16];
        grid[t / kWide][t % kWide] = x[i];
        line[t] = x[i];
        wide[t] = half(t);
        entries[t] = {int(t), float(x[i])};
        if (t < 16) vectors[t] = vec<T, 4>(T(t));
        if (t == 63) last = x[i];
        threadgroup_barrier(mem_flags::mem_threadgroup);
        uint r = 63 - t;
        threadgroup T* row = grid[r / kWide];
        half4 four = *(threadgroup half4*)(wide + 4 * (t % 8));
        x[i] = row[r % kWide] + line[t] + last + T(four.y) + T(entries[t].key) + vectors[t / 4].z;
    }
    template [[host_name("f_float")]] [[kernel]] void f<float, 8>(device float*, uint, uint);
    template [[host_name("f_half")]] [[kernel]] void f<half, 8>(device half*, uint, uint);"""
    )
    library = metalsim.compile_shader(source)
    for dtype, name in ((torch.float32, "f_float"), (torch.float16, "f_half")):
        x = torch.arange(128, dtype=dtype)
        t = torch.arange(128) % 64
        first = torch.arange(128) - t
        expected = (first + 63 - t) + (first + t) + (first + 63) + (4 * (t % 8) + 1) + t + t // 4
        with metalsim.simulate(check=check):
            getattr(library, name)(x, threads=128, group_size=64)
        assert torch.equal(x.long(), expected)


def test_macros_pragmas_and_conditionals() -> None:
    before = """
    #define WIDTH 4
    #define PASTE(a, b) a##b
    #if defined(__METAL_VERSION__) && __METAL_VERSION__ >= 310
    typedef PASTE(float, 4) Vector;
    #endif
    METAL_FUNC float total() {
        Vector v = Vector(1);
        float s = 0;
        _Pragma("clang loop unroll(full)")
        for (int i = 0; i < WIDTH; i++) s += v[i];
    #pragma unroll
        for (ushort i = 0; i < WIDTH; i++) s += v[i];
        return s;
    }"""
    assert value("total()", before) == 8


def test_compile_errors_name_the_line_of_the_source() -> None:
    with pytest.raises(metalsim.CompileError, match="line 5: use of undeclared identifier 'undeclared'"):
        metalsim.compile_shader(HEADER + "\n\nint f() { return undeclared; }")
