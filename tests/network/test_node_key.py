"""The node key: its file, its PeerId, its other uses."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libp2p.identity_utils import create_identity_from_seed
from libp2p.peer.id import ID
from solders.keypair import Keypair

from psyche_node.identity import (
    IdentityError,
    NodeKey,
    load_or_create_node_key,
    node_id,
    public_key,
    verify,
)


def test_known_answers() -> None:
    """RFC 8032, section 7.1, test 1; the PeerId is what py-libp2p prints for that key."""
    key = NodeKey(bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"))
    assert key.public.hex() == "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    assert (
        key.sign(b"")
        .hex()
        .startswith("e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bac")
    )
    assert key.node_id == "12D3KooWQK1wnefoLrcVHbbnf5tLzbopUd3K3bFAoJpA7YJgL5pV"


@given(st.binary(min_size=32, max_size=32))
def test_one_seed_is_one_identity_everywhere(seed: bytes) -> None:
    key = NodeKey(seed)
    libp2p = create_identity_from_seed(seed)
    assert str(ID.from_pubkey(libp2p.public_key)) == key.node_id
    assert bytes(key.keypair.pubkey()) == key.public == libp2p.public_key.to_bytes()
    assert bytes(Keypair.from_seed(seed).pubkey()) == key.public
    assert public_key(key.node_id) == key.public
    assert verify(key.public, b"x", key.sign(b"x"))
    assert not verify(key.public, b"y", key.sign(b"x"))


def test_the_key_is_made_once_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "node.key"
    key = load_or_create_node_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_or_create_node_key(path) == key
    assert [entry.name for entry in path.parent.iterdir()] == ["node.key"]
    assert key.seed.hex() not in repr(key)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_key_that_others_can_reach_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "node.key"
    load_or_create_node_key(path)
    os.chmod(path, mode)
    with pytest.raises(IdentityError, match="chmod 600"):
        load_or_create_node_key(path)


@pytest.mark.parametrize("content", [b"", b"short", bytes(33)])
def test_a_file_that_is_not_a_seed_is_refused_and_kept(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "node.key"
    path.touch(0o600)
    path.write_bytes(content)
    with pytest.raises(IdentityError, match="not a node key"):
        load_or_create_node_key(path)
    assert path.read_bytes() == content


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "node.key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(IdentityError):
        load_or_create_node_key(tmp_path / "node.key")
    assert not (tmp_path / "elsewhere").exists()


@given(st.text(max_size=80))
def test_no_text_is_a_peer_id_unless_it_is_one(text: str) -> None:
    try:
        key = public_key(text)
    except IdentityError:
        return
    assert node_id(key) == text


@pytest.mark.parametrize("peer", ["QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N", "", "12D3KooW", "1" * 64])
def test_peer_ids_of_other_kinds_are_refused(peer: str) -> None:
    with pytest.raises(IdentityError):
        public_key(peer)


@given(st.binary(max_size=70), st.binary(max_size=40), st.binary(max_size=70))
def test_verify_takes_anything(public: bytes, message: bytes, signature: bytes) -> None:
    assert not verify(public, message, signature)
