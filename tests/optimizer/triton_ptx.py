"""Compiles kernels for an H100 and prints, as JSON, what of their PTX could round differently; needs no device."""

import json

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from optimizer import triton_kernels as kernels
from optimizer.layout import BlockCode

TARGET = GPUTarget("cuda", 90, 32)
CODE = BlockCode(32)
CONSTANTS = {"TOPK": 32, "LOW": CODE.low, "BITMAP": CODE.bitmap, "BYTES": CODE.bytes, "CHUNK": 64, "ROWS": 4}
CONSTANTS |= {"HALVINGS": 5, "WORDS": CODE.bytes // 4, "WIDE": False}
TYPES = {"decay": "fp32", "rate": "fp32", "factor": "fp32", "indices": "*i16", "trend": "*i16", "bodies": "*u8"}
TYPES |= dict.fromkeys(("longs", "addresses", "weights"), "*i64")
TYPES |= dict.fromkeys(("pieces", "firsts", "kinds", "words", "tally"), "*i32")
TYPES |= dict.fromkeys(("momentum", "scale", "energy", "rates", "shares"), "*fp32")
FUSED = ("fma.", "mad.f32", "mad.rn.f32", "div.full", "div.approx", ".ftz")


def ptx(name: str) -> str:
    kernel = getattr(kernels, name)
    constants = {(place,): CONSTANTS[n] for place, n in enumerate(kernel.arg_names) if n in CONSTANTS}
    signature = {n: "constexpr" if n in CONSTANTS else TYPES.get(n, "i32") for n in kernel.arg_names}
    source = ASTSource(kernel, signature, constants)
    compiled = triton.compile(source, target=TARGET, options={"num_warps": 8, "enable_fp_fusion": False})
    return str(compiled.asm["ptx"])


if __name__ == "__main__":
    found = {name: ptx(name) for name in ("encode_kernel", "add_kernel", "apply_kernel")}
    print(json.dumps({name: [word for word in FUSED if word in text] for name, text in found.items()}))
