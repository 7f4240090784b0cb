/* For x86-64 with AVX-512 (F, BW, DQ, VL): 64-byte vectors. */
#if defined(__x86_64__)
#define LANES 16
#define VARIANT psyche_avx512
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,bmi,bmi2,popcnt"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,bmi,bmi2,popcnt")
#endif
#include "variant.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
