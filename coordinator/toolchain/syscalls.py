"""The system calls that a program may make, and how the virtual machine numbers them."""

from __future__ import annotations

from typing import Final

# What mainnet's runtime offers. SBPF version 3 resolves the names only when they are called: this list is the guard.
SYSCALLS: Final = frozenset(
    [
        "abort",
        "sol_panic_",
        "sol_log_",
        "sol_log_64_",
        "sol_log_compute_units_",
        "sol_log_pubkey",
        "sol_log_data",
        "sol_create_program_address",
        "sol_try_find_program_address",
        "sol_sha256",
        "sol_keccak256",
        "sol_poseidon",
        "sol_secp256k1_recover",
        "sol_curve_validate_point",
        "sol_curve_group_op",
        "sol_curve_multiscalar_mul",
        "sol_get_clock_sysvar",
        "sol_get_epoch_schedule_sysvar",
        "sol_get_rent_sysvar",
        "sol_get_epoch_rewards_sysvar",
        "sol_get_last_restart_slot",
        "sol_get_sysvar",
        "sol_get_epoch_stake",
        "sol_memcpy_",
        "sol_memmove_",
        "sol_memcmp_",
        "sol_memset_",
        "sol_invoke_signed_c",
        "sol_invoke_signed_rust",
        "sol_set_return_data",
        "sol_get_return_data",
        "sol_get_processed_sibling_instruction",
        "sol_get_stack_height",
        "sol_alt_bn128_group_op",
        "sol_alt_bn128_compression",
    ]
)


def murmur3_32(data: bytes, seed: int = 0) -> int:
    """MurmurHash3 x86 32-bit: how the virtual machine numbers system calls."""
    mask = 0xFFFFFFFF
    value = seed
    for index in range(0, len(data) - len(data) % 4, 4):
        word = int.from_bytes(data[index : index + 4], "little") * 0xCC9E2D51 & mask
        word = (word << 15 | word >> 17) & mask
        value ^= word * 0x1B873593 & mask
        value = ((value << 13 | value >> 19) & mask) * 5 + 0xE6546B64 & mask
    tail = data[len(data) - len(data) % 4 :]
    if tail:
        word = int.from_bytes(tail, "little") * 0xCC9E2D51 & mask
        word = (word << 15 | word >> 17) & mask
        value ^= word * 0x1B873593 & mask
    value ^= len(data)
    value = (value ^ value >> 16) * 0x85EBCA6B & mask
    value = (value ^ value >> 13) * 0xC2B2AE35 & mask
    return value ^ value >> 16
