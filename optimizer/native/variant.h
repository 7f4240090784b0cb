/* All kernels for vectors of LANES fp32 values, as the table VARIANT. Included once per instruction set. */
#include "kernels.h"

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the kernels are for little-endian machines; others use the torch path"
#endif
#if defined(__FAST_MATH__)
#error "the kernels round every operation as IEEE 754 says; compile them without -ffast-math"
#endif

#include "vectors.h"

#include "blocks.h"
#include "code.h"
#include "hadamard.h"

#include "apply.h"
#include "encode.h"
#include "fingerprint.h"
#include "lookahead.h"

const struct psyche_kernels VARIANT = {
    .encode = encode,
    .add = add,
    .preview = preview,
    .apply = apply,
    .inverse = inverse,
    .decode = decode,
    .validate = validate,
    .encode_blocks = encode_blocks,
    .fingerprint = fingerprint,
};
