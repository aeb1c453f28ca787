"""What Apple's compiler rejects is rejected; its legal twin compiles."""

from __future__ import annotations

import pytest

import metalsim

HEADER = "#include <metal_stdlib>\nusing namespace metal;\n"
KERNEL = "kernel void f(device float* x [[buffer(0)]], uint i [[thread_position_in_grid]]) {{ {} }}"

# name: (rejected, legal, what the message says)
SOURCES = {
    "pointer without a space": (
        "float first(float* p) { return p[0]; }",
        "float first(device float* p) { return p[0]; }",
        "line 3: pointer to 'float' without an address space",
    ),
    "reference without a space": (
        "void set(float& r) { r = 1; }",
        "void set(thread float& r) { r = 1; }",
        "reference to 'float' without an address space",
    ),
    "reference to a template parameter": (
        "template <typename T> void set(T& r) { r = 1; }",
        "template <typename T> void set(thread T& r) { r = 1; }",
        "reference to 'T' without",
    ),
    "pointer to a vector of a template": (
        "template <typename T> float first(const vec<T, 4>* p) { return p[0].x; }",
        "template <typename T> float first(const device vec<T, 4>* p) { return p[0].x; }",
        "pointer to 'vec<> const' without|pointer to 'const vec<>' without",
    ),
    "pointer member": (
        "struct S { half* p; };",
        "struct S { device half* p; };",
        "pointer to 'half' without",
    ),
    "pointer variable": (
        KERNEL.format("float* p = x; p[i] = 1;"),
        KERNEL.format("device float* p = x; p[i] = 1 * i;"),
        "pointer to 'float' without",
    ),
    "pointer to pointer": (
        "void f(device float** p) {}",
        "void f(device float* thread* p) {}",
        "pointer to 'pointer' without",
    ),
    "threadgroup pointer to device memory": (
        KERNEL.format("threadgroup float* p = x; p[i] = 1;"),
        KERNEL.format("device float* p = x; p[i] = 1;"),
        "line 3: cannot initialize a variable of type 'threadgroup float \\*' with an lvalue of type 'device float \\*'",
    ),
    "argument of another space": (
        "float first(threadgroup float* p) { return p[0]; }" + KERNEL.format("x[i] = first(x);"),
        "float first(device float* p) { return p[0]; }" + KERNEL.format("x[i] = first(x);"),
        "no matching function for call to 'first'.*address space",
    ),
    "thread reference to device memory": (
        "void set(thread float& r) { r = 1; }" + KERNEL.format("set(x[i]);"),
        "void set(device float& r) { r = 1; }" + KERNEL.format("set(x[i]);"),
        "address space",
    ),
    "constant as device": (
        "kernel void f(device int* y [[buffer(0)]], constant int* x [[buffer(1)]]) { device const int* p = x; *y = *p; }",
        "kernel void f(device int* y [[buffer(0)]], constant int* x [[buffer(1)]]) { constant int* p = x; *y = *p; }",
        "cannot initialize",
    ),
    "template over two spaces": (
        "template <typename T> T pick(device T* a, device T* b) { return *a + *b; }"
        + KERNEL.format("threadgroup float s[4]; s[0] = 1; x[i] = pick(x, s);"),
        "template <typename T> T pick(device T* a, threadgroup T* b) { return *a + *b; }"
        + KERNEL.format("threadgroup float s[4]; s[0] = 1; x[i] = pick(x, s);"),
        "no matching function",
    ),
    "cast between spaces": (
        KERNEL.format("threadgroup float s[4]; s[0] = 1; x[i] = ((device float*)s)[0];"),
        KERNEL.format("threadgroup float s[4]; s[0] = 1; x[i] = ((threadgroup float*)s)[0];"),
        "cast between address spaces",
    ),
    "store to constant memory": (
        "kernel void f(constant int& x [[buffer(0)]]) { x = 1; }",
        "kernel void f(device int& x [[buffer(0)]]) { x = 1; }",
        "not assignable|read-only|cannot assign",
    ),
    "float to bfloat": (
        KERNEL.format("bfloat b = x[i]; x[i] = b;"),
        KERNEL.format("bfloat b = bfloat(x[i]); x[i] = b;"),
        "line 3: implicit conversion of a floating point value to bfloat",
    ),
    "literal to bfloat": (
        KERNEL.format("bfloat b = 0.0f; x[i] = b;"),
        KERNEL.format("bfloat b = bfloat(0.0f); x[i] = b;"),
        "implicit conversion",
    ),
    "float to bfloat in a template": (
        "template <class T> void put(device T* p, float v) { *p = v; } template void put<bfloat>(device bfloat*, float);",
        "template <class T> void put(device T* p, float v) { *p = T(v); } template void put<bfloat>(device bfloat*, float);",
        "implicit conversion",
    ),
    "float argument to bfloat": (
        "bfloat twice(bfloat b) { return b + b; }" + KERNEL.format("x[i] = twice(x[i]);"),
        "bfloat twice(bfloat b) { return b + b; }" + KERNEL.format("x[i] = twice(static_cast<bfloat>(x[i]));"),
        "implicit conversion",
    ),
    "recursion": (
        "int down(int n) { return n > 0 ? down(n - 1) : 0; }" + KERNEL.format("x[i] = down(3);"),
        "template <int N> int down() { if constexpr (N > 0) return down<N - 1>(); else return 0; }"
        + KERNEL.format("x[i] = down<3>();"),
        "the function 'down' is recursive",
    ),
    "mutual recursion": (
        "int odd(int n); int even(int n) { return n ? odd(n - 1) : 1; } int odd(int n) { return n ? even(n - 1) : 0; }",
        "int odd(int n); int even(int n) { return n ? odd(n - 1) : 1; } int odd(int n) { return n % 2; }",
        "is recursive",
    ),
    "virtual function": (
        "struct S { virtual int f() { return 1; } };",
        "struct S { int f() { return 1; } };",
        "line 3: Metal has no 'virtual'",
    ),
    "double": (
        KERNEL.format("x[i] = double(1);"),
        KERNEL.format("x[i] = float(1);"),
        "Metal has no 'double'",
    ),
    "exception": (KERNEL.format("if (i) throw 1;"), KERNEL.format("if (i) return;"), "Metal has no 'throw'"),
    "variable of the program": (
        "float table[2] = {1, 2};",
        "constant float table[2] = {1, 2};",
        "the variable 'table' of the program is not in the constant address space",
    ),
    "constexpr of the program": (
        "constexpr int n = 2;",
        "constant constexpr int n = 2;",
        "the variable 'n' of the program",
    ),
    "static variable": (
        KERNEL.format("static int n = 0; x[i] = n++;"),
        KERNEL.format("int n = 0; x[i] = n++;"),
        "the static variable 'n'",
    ),
    "threadgroup variable outside a kernel": (
        "void g() { threadgroup float s[4]; s[0] = 1; }",
        KERNEL.format("threadgroup float s[4]; s[0] = 1;"),
        "threadgroup variables can be declared only in a kernel",
    ),
    "threadgroup variable with a value": (
        KERNEL.format("threadgroup float s = 1;"),
        KERNEL.format("threadgroup float s; s = 1;"),
        "threadgroup variables cannot be initialised",
    ),
    "buffer 31": (
        "kernel void f(device float* x [[buffer(31)]]) { x[0] = 1; }",
        "kernel void f(device float* x [[buffer(30)]]) { x[0] = 1; }",
        "buffer indices are 0 to 30",
    ),
    "two parameters of one buffer": (
        "kernel void f(device float* x [[buffer(1)]], device float* y [[buffer(1)]]) { x[0] = y[0]; }",
        "kernel void f(device float* x [[buffer(1)]], device float* y [[buffer(2)]]) { x[0] = y[0]; }",
        r"two parameters \[\[buffer\(1\)\]\]",
    ),
    "positions of different sizes": (
        "kernel void f(device float* x [[buffer(0)]], uint i [[thread_position_in_grid]],"
        "uint2 n [[threads_per_grid]]) { x[i] = n.x; }",
        "kernel void f(device float* x [[buffer(0)]], uint2 i [[thread_position_in_grid]],"
        "uint2 n [[threads_per_grid]]) { x[i.x] = n.x; }",
        "'i', 'n' must have the same number of components",
    ),
    "value parameter without an attribute": (
        "kernel void f(device float* x [[buffer(0)]], float n) { x[0] = n; }",
        "kernel void f(device float* x [[buffer(0)]], constant float& n) { x[0] = n; }",
        "parameter 'n' has no attribute",
    ),
    "threadgroup argument": (
        "kernel void f(device float* x [[buffer(0)]], threadgroup float* s [[threadgroup(0)]]) { x[0] = 1; }",
        "kernel void f(device float* x [[buffer(0)]]) { x[0] = 1; }",
        r"attribute \[\[threadgroup \( 0 \)\]\] is not supported",
    ),
    "vectors that do not mix": (
        KERNEL.format("half4 h = float4(1); x[i] = h.x;"),
        KERNEL.format("half4 h = half4(float4(1)); x[i] = h.x;"),
        "cannot initialize|cannot convert|no viable",
    ),
    "wrong number of components": (
        KERNEL.format("float4 v = float4(float2(1), 2); x[i] = v.x;"),
        KERNEL.format("float4 v = float4(float2(1), 2, 3); x[i] = v.x;"),
        "number of components does not match",
    ),
    "syntax": (KERNEL.format("x[i] = 1"), KERNEL.format("x[i] = 1;"), "line 3: expected ';'"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_rejected(name: str) -> None:
    rejected, _, says = SOURCES[name]
    with pytest.raises(metalsim.CompileError, match=f"(?s){says}"):
        metalsim.compile_shader(HEADER + rejected)


@pytest.mark.parametrize("name", SOURCES)
def test_legal(name: str) -> None:
    metalsim.compile_shader(HEADER + SOURCES[name][1])


def test_legal_uses_of_spaces() -> None:
    """Structures copied between spaces, constants as array sizes, tables, members, atomics, lambdas, auto."""
    metalsim.compile_shader(
        HEADER
        + """
    constant constexpr int kRows = 4;
    constant float kTable[kRows] = {1, 2, 3, 4};
    struct Params { int n; int strides[3]; };
    struct Tile {
        float values[kRows];
        thread float& operator[](int i) { return values[i]; }
        float sum() const { float s = 0; for (int i = 0; i < kRows; ++i) s += values[i]; return s; }
        template <typename P> void load(const device P* from) { for (int i = 0; i < kRows; ++i) values[i] = from[i]; }
        static METAL_FUNC int rows() { return kRows; }
    };
    template <typename T, int N> struct Fragment {
        static constant constexpr int size = N;
        using Vector = vec<T, N>;
        Vector v;
        void store(threadgroup Vector* to) const thread { *to = v; }
    };
    int first(constant int* s) { return s[0]; }
    kernel void f(device float* x, constant Params& params, device Params* out, device atomic_uint* count,
                  uint i [[thread_position_in_grid]]) {
        threadgroup float4 s[kRows];
        threadgroup atomic_uint local;
        Params copy = params;
        out[i] = copy;
        Tile tile;
        tile.load(x);
        tile[1] = 2;
        Fragment<float, 4> fragment;
        fragment.v = float4(tile.sum());
        fragment.store(&s[i % 4]);
        atomic_store_explicit(&local, 0u, memory_order_relaxed);
        atomic_fetch_add_explicit(count, 1u, memory_order_relaxed);
        auto get = [&](int n) { return x[n] * kTable[n % kRows]; };
        auto q = x[0];
        q += get(first(params.strides));
        device float4* wide = (device float4*)x;
        wide[i].xy = s[0].zw;
        x[i] = q + Tile::rows() + Fragment<float, 4>::size;
    }"""
    )


def test_characters_that_are_not_ascii_are_named_with_their_line() -> None:
    """`torch.mps.compile_shader` passes sources on as ASCII: one such character, and nothing compiles."""
    with pytest.raises(metalsim.CompileError, match="line 2: a character that is not ASCII"):
        metalsim.compile_shader("// plain\n// caf\u00e9\n")


def test_every_rejection_is_named_with_its_line() -> None:
    with pytest.raises(metalsim.CompileError) as caught:
        metalsim.compile_shader(HEADER + "void f(float* p) {}\n\nvoid g(half& r) {}\n")
    assert str(caught.value).splitlines() == [
        "line 3: pointer to 'float' without an address space",
        "line 5: reference to 'half' without an address space",
    ]
