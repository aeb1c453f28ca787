// Which of the compiled instruction sets this processor has.
#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if PAGEDFLASH_HAS_amx
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pagedflash {

#define DECLARE(isa)               \
  namespace isa {                  \
  extern const Kernels KERNELS;    \
  }
#if PAGEDFLASH_HAS_amx
DECLARE(amx)
#endif
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
// Linux gives AMX's tiles to a process that asks for them: once, for all its threads.
bool ask_for_tiles() {
#if PAGEDFLASH_HAS_amx
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
  return false;
#endif
}

struct Cpu {
  bool avx2 = false, avx512 = false, avx512bf16 = false, amx = false;
  bool intel = false;

  Cpu() {
    uint32_t a = 0, b = 0, c = 0, d = 0;
    intel = __get_cpuid(0, &a, &b, &c, &d) && b == signature_INTEL_ebx;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return;
    const bool fma = c >> 12 & 1, os_saves = c >> 27 & 1, f16c = c >> 29 & 1;
    if (!os_saves) return;
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    const bool saves_ymm = (low & 0x06) == 0x06, saves_zmm = (low & 0xE6) == 0xE6;
    const bool saves_tiles = (low >> 17 & 3) == 3;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    const uint32_t f_dq_bw_vl = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
    avx2 = saves_ymm && fma && f16c && (b >> 5 & 1);
    avx512 = avx2 && saves_zmm && (b & f_dq_bw_vl) == f_dq_bw_vl;
    const bool tiles = saves_tiles && (d >> 24 & 1) && (d >> 22 & 1);  // AMX-TILE and AMX-BF16
    avx512bf16 = avx512 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
    amx = avx512bf16 && tiles && ask_for_tiles();
  }
};

const Cpu CPU;  // read once, when the library is loaded: CPUID is slow on a virtual machine

bool has_avx2() { return CPU.avx2; }
bool has_avx512() { return CPU.avx512; }
bool has_avx512bf16() { return CPU.avx512bf16; }
[[maybe_unused]] bool has_amx() { return CPU.amx; }
#endif

struct Isa {
  const char* name;
  const Kernels* kernels;
  bool (*present)();
};

const Isa ISAS[] = {
#if PAGEDFLASH_HAS_amx
    {"amx", &amx::KERNELS, has_amx},
#endif
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

// Intel's VDPBF16 takes four times as long as a multiply-add, for twice the work: there, AVX-512 alone is faster.
int64_t best_isa() {
  for (int64_t isa = 0; isa < ISA_COUNT; isa++) {
#if PAGEDFLASH_HAS_avx512bf16
    if (ISAS[isa].kernels == &avx512bf16::KERNELS && CPU.intel) continue;
#endif
    if (ISAS[isa].present()) return isa;
  }
  return -1;
}

const char* isa_name(int64_t isa) { return isa < ISA_COUNT ? ISAS[isa].name : nullptr; }
const Kernels* kernels_of(int64_t isa) {
  return isa >= 0 && isa < ISA_COUNT && ISAS[isa].present() ? ISAS[isa].kernels : nullptr;
}

}  // namespace pagedflash
