"""What the builders of instructions refuse by themselves, and that signatures are checked."""

from __future__ import annotations

from dataclasses import replace

import pytest
from program_harness import LIMITS, TERMS, Chain
from solders.keypair import Keypair
from solders.pubkey import Pubkey

from coordinator import instructions as ix
from coordinator.addresses import run_addresses, run_seeds


def test_builders_refuse_what_does_not_fit() -> None:
    program, owner = Pubkey.new_unique(), Pubkey.new_unique()
    addresses = run_addresses(program, owner, "x")
    with pytest.raises(ValueError, match="1 to 32"):
        run_seeds("x" * 33)
    with pytest.raises(ValueError, match="1 to 32"):
        run_seeds("")
    with pytest.raises(ValueError, match="32"):
        ix.ready(addresses, program, owner, b"short")
    with pytest.raises(ValueError, match="slot 256"):
        ix.attest(addresses, program, owner, 0, [256])
    with pytest.raises(ValueError, match="commit"):
        ix.commit(addresses, program, owner, 0, bytes(32), 2**64, 0, 0)
    with pytest.raises(ValueError, match=r"terms\.model_source"):
        ix.init_run(program, owner, "x", LIMITS, replace(TERMS, model_source="x" * 65))
    with pytest.raises(ValueError, match=r"limits\.batch"):
        ix.init_run(program, owner, "x", replace(LIMITS, batch=-1), TERMS)
    with pytest.raises(ValueError, match=r"terms\.samples"):
        ix.init_run(program, owner, "x", LIMITS, replace(TERMS, samples=2**64))


def test_signatures_are_really_needed() -> None:
    """With signature checks on: nobody registers another's node key, and a forged signature does not pass."""
    chain = Chain(sigverify=True)
    owner, wallet, node = (Keypair.from_seed(bytes([seed]) * 32) for seed in (41, 42, 43))
    for key in (owner, wallet):
        chain.svm.airdrop(key.pubkey(), 10**11)
    rent = chain.svm.minimum_balance_for_rent_exemption
    create = ix.create_run_instructions(
        chain.program, owner.pubkey(), "signed", LIMITS, TERMS, rent, chain.payer.pubkey()
    )
    assert chain.send(create, [owner]).ok
    addresses = run_addresses(chain.program, owner.pubkey(), "signed")
    join = ix.join(addresses, chain.program, wallet.pubkey(), node.pubkey())
    with pytest.raises(BaseException, match="NotEnoughSigners"):
        chain.send(join, [wallet])
    chain.sigverify = False  # unsigned bytes, as an attacker would send them; the runtime still verifies
    assert not chain.send(join).ok
    chain.sigverify = True
    assert chain.send(join, [wallet, node]).ok
