/* For every machine: 16-byte vectors, which are native on x86-64 (SSE2) and aarch64 (NEON). */
#define LANES 4
#define VARIANT psyche_baseline
#include "variant.h"
