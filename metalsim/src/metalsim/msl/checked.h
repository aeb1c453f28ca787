// Reports every load and store of a kernel to the runtime: the call-outs of clang's -fsanitize=kernel-address.
#pragma once
#include "../runtime/api.h"

extern "C" void metalsim_access(metalsim::uptr address, metalsim::u64 size, metalsim::u32 flags, metalsim::uptr site);

#define METALSIM_CALLOUT                                                                                      \
    extern "C" __attribute__((noinline, visibility("hidden"), no_sanitize("kernel-address")))
#define METALSIM_SITE metalsim::uptr(__builtin_return_address(0))
#define METALSIM_SIZED(n)                                                                                     \
    METALSIM_CALLOUT void __asan_load##n##_noabort(metalsim::uptr address) {                                  \
        metalsim_access(address, n, 0, METALSIM_SITE);                                                        \
    }                                                                                                         \
    METALSIM_CALLOUT void __asan_store##n##_noabort(metalsim::uptr address) {                                 \
        metalsim_access(address, n, 1, METALSIM_SITE);                                                        \
    }
METALSIM_SIZED(1)
METALSIM_SIZED(2)
METALSIM_SIZED(4)
METALSIM_SIZED(8)
METALSIM_SIZED(16)

// Accesses of other sizes, and those that the source allows to be unaligned (packed types).
METALSIM_CALLOUT void __asan_loadN_noabort(metalsim::uptr address, metalsim::u64 size) {
    metalsim_access(address, size, 2, METALSIM_SITE);
}
METALSIM_CALLOUT void __asan_storeN_noabort(metalsim::uptr address, metalsim::u64 size) {
    metalsim_access(address, size, 3, METALSIM_SITE);
}
METALSIM_CALLOUT void* __asan_memcpy(void* to, const void* from, metalsim::u64 size) {
    metalsim_access(metalsim::uptr(from), size, 2, METALSIM_SITE);
    metalsim_access(metalsim::uptr(to), size, 3, METALSIM_SITE + 1);
    return __builtin_memcpy(to, from, size);
}
METALSIM_CALLOUT void* __asan_memmove(void* to, const void* from, metalsim::u64 size) {
    metalsim_access(metalsim::uptr(from), size, 2, METALSIM_SITE);
    metalsim_access(metalsim::uptr(to), size, 3, METALSIM_SITE + 1);
    return __builtin_memmove(to, from, size);
}
METALSIM_CALLOUT void* __asan_memset(void* to, int value, metalsim::u64 size) {
    metalsim_access(metalsim::uptr(to), size, 3, METALSIM_SITE);
    return __builtin_memset(to, value, size);
}
METALSIM_CALLOUT void __asan_handle_no_return() {}
