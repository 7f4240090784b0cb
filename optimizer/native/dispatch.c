/* Which variant of the kernels this machine can run. */
#include "kernels.h"

#include <string.h>

#define EXPORT __attribute__((visibility("default")))

static int has_avx2(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
           __builtin_cpu_supports("popcnt");
#else
    return 0;
#endif
}

static int has_avx512(void) {
#if defined(__x86_64__)
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
    return 0;
#endif
}

EXPORT int32_t psyche_abi(void) {
    return PSYCHE_ABI;
}

/* The variant called `name`; NULL if this machine cannot run it. */
EXPORT const struct psyche_kernels *psyche_isa(const char *name) {
    if (!strcmp(name, "baseline"))
        return &psyche_baseline;
#if defined(__x86_64__)
    if (!strcmp(name, "avx2") && has_avx2())
        return &psyche_avx2;
    if (!strcmp(name, "avx512") && has_avx512())
        return &psyche_avx512;
#endif
    (void)has_avx2;
    (void)has_avx512;
    return 0;
}
