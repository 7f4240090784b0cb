/* For x86-64 with AVX2 and BMI: 32-byte vectors. */
#if defined(__x86_64__)
#define LANES 8
#define VARIANT psyche_avx2
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,bmi,bmi2,popcnt"))), apply_to = function)
#else
#pragma GCC target("avx2,bmi,bmi2,popcnt")
#endif
#include "variant.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
