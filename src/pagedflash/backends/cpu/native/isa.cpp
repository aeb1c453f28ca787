// Which of the compiled instruction sets this processor has.
#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace pagedflash {

#define DECLARE(isa)               \
  namespace isa {                  \
  extern const Kernels KERNELS;    \
  }
#if PAGEDFLASH_HAS_avx512bf16
DECLARE(avx512bf16)
#endif
#if PAGEDFLASH_HAS_avx512
DECLARE(avx512)
#endif
#if PAGEDFLASH_HAS_avx2
DECLARE(avx2)
#endif
#if PAGEDFLASH_HAS_neon
DECLARE(neon)
#endif
#if PAGEDFLASH_HAS_generic
DECLARE(generic)
#endif
#undef DECLARE

namespace {

bool always() { return true; }

#if defined(__x86_64__)
struct Cpu {
  bool avx2 = false, avx512 = false, avx512bf16 = false;

  Cpu() {
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return;
    const bool fma = c >> 12 & 1, os_saves = c >> 27 & 1, f16c = c >> 29 & 1;
    if (!os_saves) return;
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    const bool saves_ymm = (low & 0x06) == 0x06, saves_zmm = (low & 0xE6) == 0xE6;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    const uint32_t f_dq_bw_vl = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
    avx2 = saves_ymm && fma && f16c && (b >> 5 & 1);
    avx512 = avx2 && saves_zmm && (b & f_dq_bw_vl) == f_dq_bw_vl;
    avx512bf16 = avx512 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
  }
};

const Cpu CPU;  // read once, when the library is loaded: CPUID is slow on a virtual machine

bool has_avx2() { return CPU.avx2; }
bool has_avx512() { return CPU.avx512; }
bool has_avx512bf16() { return CPU.avx512bf16; }
#endif

struct Isa {
  const char* name;
  const Kernels* kernels;
  bool (*present)();
};

const Isa ISAS[] = {
#if PAGEDFLASH_HAS_avx512bf16
    {"avx512bf16", &avx512bf16::KERNELS, has_avx512bf16},
#endif
#if PAGEDFLASH_HAS_avx512
    {"avx512", &avx512::KERNELS, has_avx512},
#endif
#if PAGEDFLASH_HAS_avx2
    {"avx2", &avx2::KERNELS, has_avx2},
#endif
#if PAGEDFLASH_HAS_neon
    {"neon", &neon::KERNELS, always},
#endif
#if PAGEDFLASH_HAS_generic
    {"generic", &generic::KERNELS, always},
#endif
};
constexpr int64_t ISA_COUNT = sizeof ISAS / sizeof ISAS[0];

}  // namespace

const char* isa_name(int64_t isa) { return isa < ISA_COUNT ? ISAS[isa].name : nullptr; }
const Kernels* kernels_of(int64_t isa) {
  return isa >= 0 && isa < ISA_COUNT && ISAS[isa].present() ? ISAS[isa].kernels : nullptr;
}

}  // namespace pagedflash
