"""Elements of one byte, read as 16-bit words of two neighbours: an even column of a tile and the odd one behind it.

The matrix units take 16-bit operands, and ``ldmatrix``, which brings tiles from shared memory into their layout, moves 16
bits too. So words come the way that 16-bit elements do, and are taken apart in registers: even columns are one operand, odd
columns another. Bytes would go through shared memory twice, and be converted one by one.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

OPERANDS = tl.constexpr("=&r,=&r,r")
"""Of the PTX below: $2 holds two words; $0 gets their even elements, $1 their odd ones."""

INT8_TO_BFLOAT16 = """{
    .reg .b32 bits<2>, sign<2>, odd, minus_one;
    mov.b32 minus_one, 0xbf80bf80; shr.u32 odd, $2, 8;
    lop3.b32 bits0, $2, 0x007f007f, 0x43004300, 0xea; lop3.b32 sign0, $2, 0x00800080, 0x43004300, 0xea;
    lop3.b32 bits1, odd, 0x007f007f, 0x43004300, 0xea; lop3.b32 sign1, odd, 0x00800080, 0x43004300, 0xea;
    fma.rn.bf16x2 $0, sign0, minus_one, bits0; fma.rn.bf16x2 $1, sign1, minus_one, bits1;
}"""
"""(128 + the lower 7 bits) - (128 + the upper one): 0x4300 is 128, whose last bit is 1. lop3: ``(x & mask) | 0x4300``."""

INT8_TO_FLOAT16 = """{
    .reg .b32 raised, even, odd, exponent, bias;
    mov.b32 exponent, 0x64646464; mov.b32 bias, 0xe480e480; xor.b32 raised, $2, 0x80808080;
    prmt.b32 even, raised, exponent, 0x4240; prmt.b32 odd, raised, exponent, 0x4341;
    add.rn.f16x2 $0, even, bias; add.rn.f16x2 $1, odd, bias;
}"""
"""(1024 + 128 + the element) - 1152: 0x6400 is 1024, whose last bit counts 1."""

FLOAT8_TO_FLOAT16 = """{
    .reg .b16 word<2>; .reg .b32 both<2>;
    mov.b32 {word0, word1}, $2;
    cvt.rn.f16x2.FORMATx2 both0, word0; cvt.rn.f16x2.FORMATx2 both1, word1;
    prmt.b32 $0, both0, both1, 0x5410; prmt.b32 $1, both0, both1, 0x7632;
}"""

FLOAT8_TO_BFLOAT16 = """{
    .reg .b16 word<2>, half<4>; .reg .b32 both<2>; .reg .f32 full<4>;
    mov.b32 {word0, word1}, $2;
    cvt.rn.f16x2.FORMATx2 both0, word0; cvt.rn.f16x2.FORMATx2 both1, word1;
    mov.b32 {half0, half1}, both0; mov.b32 {half2, half3}, both1;
    cvt.f32.f16 full0, half0; cvt.f32.f16 full1, half1; cvt.f32.f16 full2, half2; cvt.f32.f16 full3, half3;
    cvt.rn.bf16x2.f32 $0, full2, full0; cvt.rn.bf16x2.f32 $1, full3, full1;
}"""
"""By way of float16 and float32, so that NaN and infinity stay what they are."""

FORMATS = {"float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2"}
"""Names of formats in PTX."""


@triton.constexpr_function
def ptx_of(format, dtype):
    if format == "int8":
        return INT8_TO_BFLOAT16 if dtype == tl.bfloat16 else INT8_TO_FLOAT16
    return (FLOAT8_TO_BFLOAT16 if dtype == tl.bfloat16 else FLOAT8_TO_FLOAT16).replace("FORMAT", FORMATS[format])


@triton.jit
def unpack(tile, FORMAT: tl.constexpr, dtype: tl.constexpr):
    """``(even columns, odd columns)`` of a tile of words, or of one that has elements, in the 16-bit ``dtype``, exactly."""
    if tile.dtype != tl.int16:
        even, odd = split_columns(tile.to(dtype))
    elif INTERPRETED:
        even = element_of(tile, FORMAT).to(dtype)
        odd = element_of(tile >> 8, FORMAT).to(dtype)
    else:
        even, odd = tl.inline_asm_elementwise(ptx_of(FORMAT, dtype), OPERANDS, [tile], (tl.int16, tl.int16), True, 2)
        even = even.to(dtype, bitcast=True)
        odd = odd.to(dtype, bitcast=True)
    return even, odd


@triton.jit
def element_of(word, FORMAT: tl.constexpr):
    """The lower byte of each word."""
    if FORMAT == "int8":
        element = word.to(tl.int8)
    elif FORMAT == "float8_e4m3fn":
        element = word.to(tl.int8).to(tl.float8e4nv, bitcast=True)
    else:
        element = word.to(tl.int8).to(tl.float8e5, bitcast=True)
    return element


@triton.jit
def split_columns(tile):
    return tl.split(tl.reshape(tile, (tile.shape[0], tile.shape[1] // 2, 2)))


@triton.jit
def join_columns(even, odd):
    return tl.reshape(tl.join(even, odd), (even.shape[0], 2 * even.shape[1]))
