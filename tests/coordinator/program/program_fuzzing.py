"""Instructions as an attacker would send them: bytes, lengths, accounts, flags and signers changed at random.

Each case starts from a state reached by valid play (program_scenes.py) and sends some mutated instructions in a row.
Whatever they are, each ends with success or with one of the program's numbers, within its budget of compute units; and
a refused one has changed nothing. A case depends on its seed and number alone.

python tests/coordinator/program/program_fuzzing.py 1000000             executions
python tests/coordinator/program/program_fuzzing.py --replay SEED CASE  the same case again, step by step
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from program_harness import CLOCK, LOADER, RENT, SYSTEM, Chain
from program_host import HostProgram, Passed
from program_offers import BUILDERS, View, fresh_key
from program_scenes import AUTHORITY, SCENES, Scene, play
from solders.account import Account
from solders.instruction import Instruction
from solders.pubkey import Pubkey
from solders.transaction import Transaction
from solders.transaction_metadata import FailedTransactionMetadata, SimulatedTransactionInfo, TransactionMetadata
from solders.transaction_status import (
    InstructionErrorCustom,
    TransactionErrorInstructionError,
    TransactionErrorInsufficientFundsForRent,
)

from coordinator.errors import ErrorCode
from coordinator.instruction_data import MARKS
from coordinator.layout import GRANT_SIZE, MEMBERS_SIZE, RECEIPT_SIZE, ROUNDS_SIZE, RUN_SIZE, UNKNOWN_SLOT

SEED = 20261130
CASE = 40  # executions in one case
MAX_UNITS = 60_000
INSTRUCTIONS_SYSVAR = Pubkey.from_string("Sysvar1nstructions1111111111111111111111111")
SLOT_HASHES = Pubkey.from_string("SysvarS1otHashes111111111111111111111111111")
KINDS = (RUN_SIZE, MEMBERS_SIZE, ROUNDS_SIZE, GRANT_SIZE, RECEIPT_SIZE)
EDGES = [0, 1, 2, 3, 31, 32, 33, 127, 128, 255, 256, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]
NOTHING = Account(0, b"", SYSTEM)
KNOWN = {code.value: code.name for code in ErrorCode}

Result = TransactionMetadata | FailedTransactionMetadata
Meta = tuple[bytes, bool, bool]


class Defect(AssertionError):
    """An execution that ended as none may; the text replays it."""


@dataclass(slots=True)
class Call:
    """An instruction that is easy to change: accounts as (key, signs, is written)."""

    name: str
    data: bytes
    metas: list[Meta]

    @classmethod
    def of(cls, name: str, instruction: Instruction) -> Call:
        metas = [(bytes(meta.pubkey), meta.is_signer, meta.is_writable) for meta in instruction.accounts]
        return cls(name, bytes(instruction.data), metas)


def _length(value: int) -> bytes:
    """Solana's compact 16-bit lengths."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def transaction(call: Call, program: bytes, payer: bytes, blockhash: bytes) -> Transaction:
    """Assembled by hand: an order of magnitude faster than by objects, and this is what bounds the fuzzing."""
    flags: dict[bytes, int] = {}  # 2: read only, 1: written, minus 2 for who signs
    for key, signs, written in call.metas:
        rank = (0 if signs else 2) + (0 if written else 1)
        known = flags.get(key, 3)
        flags[key] = (known & 2 & rank) | (known & 1 & rank)
    flags[payer] = 0
    flags.setdefault(program, 3)
    ordered = sorted(flags, key=lambda key: (flags[key], key != payer))
    places = {key: bytes([place]) for place, key in enumerate(ordered)}
    counts = [0, 0, 0, 0]
    for rank in flags.values():
        counts[rank] += 1
    signers = counts[0] + counts[1]
    message = bytes([signers, counts[1], counts[3]]) + _length(len(ordered)) + b"".join(ordered) + blockhash + b"\x01"
    message += places[program] + _length(len(call.metas)) + b"".join(places[key] for key, _, _ in call.metas)
    message += _length(len(call.data)) + call.data
    return Transaction.from_bytes(_length(signers) + bytes(64) * signers + message)


@dataclass
class World:
    """One chain with all scenes, and the accounts that an attacker may pass instead."""

    arch: str = "v3"
    baseline: dict[Pubkey, Account] = field(default_factory=dict)
    written: set[Pubkey] = field(default_factory=set)  # since the last reset

    def __post_init__(self) -> None:
        self.chain = Chain(self.arch)
        self.chain.svm = self.chain.svm.with_blockhash_check(False)
        self.payer = bytes(self.chain.payer.pubkey())
        self.program = bytes(self.chain.program)
        self.scenes = [play(self.chain, name) for name in SCENES]
        self.foreign = self._foreign()
        programdata, _ = Pubkey.find_program_address([self.program], LOADER)
        known = (self.chain.program, programdata, LOADER, SYSTEM, CLOCK, RENT, SLOT_HASHES, INSTRUCTIONS_SYSVAR)
        self.runtimes = {bytes(key) for key in known}  # never writable, whatever a message says
        for scene in self.scenes:
            self.baseline |= scene.accounts
            self.written.update(scene.accounts)  # the spare run's accounts do not exist yet

    def reset(self, scene: Scene) -> None:
        """Everything as it was when the world was made, and the slot as in the scene."""
        for address in self.written:
            self.chain.svm.set_account(address, self.baseline[address])
        self.written.clear()
        self.chain.set_slot(scene.slot)

    def _foreign(self) -> list[bytes]:
        """Fresh accounts of the program in sizes that are right or nearly so, one account that is another program's,
        sysvars, programs, and a key with nothing behind it."""
        svm, program = self.chain.svm, self.chain.program
        found = []
        for size in (
            0,
            7,
            8,
            12,
            160,
            256,
            *[s + d for s in (RUN_SIZE, MEMBERS_SIZE, ROUNDS_SIZE) for d in (-1, 0, 1)],
        ):
            key = fresh_key(size)
            self.baseline[key] = Account(svm.minimum_balance_for_rent_exemption(size), bytes(size), program)
            svm.set_account(key, self.baseline[key])
            found.append(key)
        other = Pubkey(b"\xee" * 32)
        real = svm.get_account(self.scenes[2].run.addresses.run)
        assert real is not None
        svm.set_account(other, Account(real.lamports, bytes(real.data), SYSTEM))
        programdata, _ = Pubkey.find_program_address([self.program], LOADER)
        found += [other, programdata, program, LOADER, SYSTEM, CLOCK, RENT, SLOT_HASHES, INSTRUCTIONS_SYSVAR]
        found.append(Pubkey(b"\xdd" * 32))
        return [bytes(key) for key in found]


class Mutator:
    """Changes calls. Half of them by one thing only: the checks that come late are reached by what is nearly right."""

    def __init__(self, world: World, scene: Scene, rng: random.Random) -> None:
        self.world, self.scene, self.rng = world, scene, rng
        others = rng.sample(world.scenes, 2)
        self.own = [bytes(key) for key in scene.accounts]
        self.others = [bytes(key) for other in others for key in other.accounts]
        self.people = [bytes(scene.run.wallet(rng.randrange(scene.people))) for _ in range(3)] + [
            bytes(scene.run.owner),
            bytes(AUTHORITY),
            world.payer,
        ]
        self.marks = list(MARKS.values())

    def change(self, call: Call) -> Call:
        data, metas = bytearray(call.data), list(call.metas)
        for _ in range(self.rng.choice((0, 1, 1, 1, 1, 2, 3, 6))):
            if self.rng.random() < 0.5:
                data = self._data(data)
            else:
                self._accounts(metas)
        return Call(call.name, bytes(data[:700]), metas[:20])

    def _data(self, data: bytearray) -> bytearray:
        rng = self.rng
        kind = rng.randrange(12)
        if kind < 8 and len(data) < 12:
            return data
        if kind < 8:  # a field becomes an edge, or one more or less
            width = rng.choice((4, 8))
            at = rng.randrange(8, len(data), 4)
            old = int.from_bytes(data[at : at + width], "little")
            new = rng.choice([rng.choice(EDGES), old + rng.choice((-1, 1)), rng.getrandbits(64)]) % 2 ** (8 * width)
            data[at : at + width] = new.to_bytes(width, "little")[: len(data) - at]
        elif kind == 8 and data:
            data[rng.randrange(len(data))] ^= rng.choice((1, 128, 255, rng.randrange(256)))
        elif kind == 9:
            del data[rng.randrange(len(data) + 1) :]
        elif kind == 10:
            data += rng.randbytes(rng.choice((1, 4, 8, 200)))
        elif kind == 11 and rng.random() < 0.3:
            data[:8] = rng.choice(self.marks)
        elif rng.random() < 0.5:
            data = data[:8] + bytes(len(data[8:]))
        else:
            del data[len(data) - rng.choice((1, 4, 8)) :]
        return data

    def _key(self) -> bytes:
        return self.rng.choice(self.rng.choice((self.own, self.others, self.people, self.world.foreign)))

    def _accounts(self, metas: list[Meta]) -> None:
        rng = self.rng
        kind = rng.randrange(10)
        at = rng.randrange(len(metas)) if metas else 0
        if kind == 0 or not metas:
            metas.insert(at, (self._key(), rng.random() < 0.3, rng.random() < 0.7))
        elif kind == 1:
            del metas[at]
        elif kind == 2:
            del metas[at:]
        elif kind == 3:
            metas[at] = (self._key(), metas[at][1], metas[at][2])
        elif kind == 4:
            key, signs, written = metas[at]
            metas[at] = (key, not signs, written)
        elif kind == 5:
            key, signs, written = metas[at]
            metas[at] = (key, signs, not written)
        elif kind == 6:
            other = rng.randrange(len(metas))
            metas[at], metas[other] = metas[other], metas[at]
        elif kind == 7:  # the same account in several places
            metas[rng.randrange(len(metas))] = metas[at]
        elif kind == 8:
            metas.insert(at, metas[rng.randrange(len(metas))])
        else:
            metas += [metas[at]] * rng.choice((1, 6, 12))


class Fuzzer:
    """Runs cases and counts how they end."""

    def __init__(self, arch: str = "v3", seed: int = SEED, host: HostProgram | None = None) -> None:
        self.world, self.seed, self.host = World(arch), seed, host
        self.compared = 0  # executions with the host's
        self.seen: Counter[str] = Counter()
        self.succeeded: Counter[str] = Counter()
        self.worst = 0

    def case(self, number: int, executions: int = CASE, log: Callable[[str], None] | None = None) -> None:
        """Raises Defect."""
        rng = random.Random(f"{self.seed}/{number}")
        world = self.world
        scene = world.scenes[number % len(world.scenes)]
        world.reset(scene)
        if scene.header.due_slot != UNKNOWN_SLOT and rng.random() < 0.5:
            world.chain.set_slot(max(scene.slot, scene.header.due_slot))
        view = View(scene, rng)
        pool, good = self._pool(view)
        mutator = Mutator(world, scene, rng)
        for index in range(executions):
            if rng.random() < 0.1:
                world.chain.advance(rng.choice((1, 5, 60, 2000)))
            call = mutator.change(rng.choice(rng.choice(good) if good and rng.random() < 0.75 else pool))
            try:
                ended = self._execute(scene, call, keep=rng.random() < 0.3)
            except Defect as defect:
                step = self._describe(scene, number, index, call)
                again = f"replay: --arch {world.arch} --replay {self.seed} {number}"
                raise Defect(f"{step}\n  -> {defect}\n  {again}") from None
            self.seen[ended] += 1
            if log:
                log(f"{self._describe(scene, number, index, call)}\n  -> {ended}")

    def _pool(self, view: View) -> tuple[list[Call], list[list[Call]]]:
        """Calls to change, of every kind at least one; and, by kind, those that would succeed as they are."""
        svm, names = self.world.chain.svm, list(BUILDERS)
        pool: list[Call] = []
        good: dict[str, list[Call]] = {}
        for name in [*names, *view.rng.choices(names, k=2 * len(names))]:
            call = Call.of(name, BUILDERS[name](view))
            sent = transaction(call, self.world.program, self.world.payer, bytes(svm.latest_blockhash()))
            pool.append(call)
            if isinstance(svm.simulate_transaction(sent), SimulatedTransactionInfo):
                good.setdefault(name, []).append(call)
        return pool, list(good.values())

    def _execute(self, scene: Scene, call: Call, keep: bool) -> str:
        svm = self.world.chain.svm
        sent = transaction(call, self.world.program, self.world.payer, bytes(svm.latest_blockhash()))
        touched = [Pubkey(key) for key in {meta[0]: None for meta in call.metas} if key != self.world.payer]
        before = [(address, svm.get_account(address)) for address in touched]
        foretold = self._on_host(call) if self.host else None
        result = svm.send_transaction(sent)
        if foretold:
            self._compare(result, *foretold)
        meta = result if isinstance(result, TransactionMetadata) else result.meta()
        units = meta.compute_units_consumed()
        self.worst = max(self.worst, units)
        if units > MAX_UNITS:
            raise Defect(f"{units} compute units")
        if isinstance(result, TransactionMetadata):
            self.succeeded[call.name] += 1
            for address, account in before:
                if svm.get_account(address) == account:
                    continue
                if keep:
                    self.world.baseline.setdefault(address, account or NOTHING)
                    self.world.written.add(address)
                else:
                    svm.set_account(address, account or NOTHING)
            return "ok"
        if any(svm.get_account(address) != account for address, account in before):
            raise Defect("a refused instruction changed an account")
        error = result.err()
        if isinstance(error, TransactionErrorInstructionError) and isinstance(error.err, InstructionErrorCustom):
            name = KNOWN.get(error.err.code)
            if name is not None:
                return name
        if isinstance(error, TransactionErrorInsufficientFundsForRent):
            return "rent"  # the runtime's: a payment too small to bring an account into being
        raise Defect(f"{error!r} {meta.logs()}")

    def _on_host(self, call: Call) -> tuple[int, list[Passed], list[Passed]] | None:
        """The program's answer on this computer, the accounts before and after; None where the runtime would hand it
        other flags than the message has."""
        world = self.world
        if not self.host or not world.runtimes.isdisjoint(key for key, _, _ in call.metas):
            return None
        signs = {key for key, signing, _ in call.metas if signing} | {world.payer}
        written = {key for key, _, writing in call.metas if writing} | {world.payer}
        before = []
        for key, _, _ in call.metas:
            account = world.chain.svm.get_account(Pubkey(key)) or NOTHING
            state = (bytes(account.owner), account.lamports, bytes(account.data))
            before.append(Passed(key, key in signs, key in written, *state))
        code, after = self.host.run(before, call.data, world.program, world.chain.slot)
        return code, before, after

    def _compare(self, result: Result, code: int, before: list[Passed], after: list[Passed]) -> None:
        """A refused instruction must not even have tried to write; one that succeeds writes the same on both."""
        self.compared += 1
        if not isinstance(result, TransactionMetadata):
            error = result.err()
            if isinstance(error, TransactionErrorInsufficientFundsForRent):
                return
            known = isinstance(error, TransactionErrorInstructionError) and isinstance(
                error.err, InstructionErrorCustom
            )
            found = error.err.code if known else None
            if code != found:
                raise Defect(f"{found} on chain, {code} on this computer")
            if before != after:
                raise Defect("an instruction wrote before it was refused")
            return
        if code:
            raise Defect(f"success on chain, {code} on this computer")
        for passed in after:
            account = self.world.chain.svm.get_account(Pubkey(passed.key)) or NOTHING
            if passed.key == self.world.payer:
                continue  # pays the fee
            if (account.lamports, bytes(account.data) if account.lamports else b"") != (
                passed.lamports,
                passed.data if passed.lamports else b"",
            ):
                raise Defect(f"{Pubkey(passed.key)} is not as this computer would leave it")

    def _describe(self, scene: Scene, number: int, index: int, call: Call) -> str:
        roles = {bytes(getattr(scene.run.addresses, name)): name for name in ("run", "members", "rounds")}
        metas = [
            f"{roles.get(key) or Pubkey(key)}{' signs' if signs else ''}{' written' if written else ''}"
            for key, signs, written in call.metas
        ]
        where = f"case {number}, step {index}: {call.name} in scene {scene.name!r}, slot {self.world.chain.slot}"
        return f"{where}\n  data {call.data.hex()}\n  accounts {', '.join(metas)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("executions", type=int, nargs="?", default=100_000)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--arch", choices=("v3", "v0"), default="v3")
    parser.add_argument("--host", action="store_true", help="compare with the program compiled for this computer")
    parser.add_argument("--replay", type=int, nargs=2, metavar=("SEED", "CASE"))
    options = parser.parse_args()
    host = HostProgram() if options.host else None
    if options.replay:
        seed, case = options.replay
        Fuzzer(options.arch, seed, host).case(case, log=print)
        return 0
    fuzzer, started = Fuzzer(options.arch, options.seed, host), time.monotonic()
    for case in range(-(-options.executions // CASE)):
        fuzzer.case(case)
    elapsed = time.monotonic() - started
    total = sum(fuzzer.seen.values())
    print(f"{total} executions in {elapsed:.0f} s ({total / elapsed:.0f} per second), seed {options.seed}: no defect")
    if host:
        print(f"{fuzzer.compared} of them compared with this computer's")
    print(f"at most {fuzzer.worst} compute units; succeeded: {dict(fuzzer.succeeded)}")
    print(f"ended: {dict(fuzzer.seen.most_common())}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
