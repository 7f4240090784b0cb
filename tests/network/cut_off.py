"""A node that loses every connection for a long time: ``python tests/network/cut_off.py [SECONDS, 600 by default]``.

The only other node is stopped (SIGSTOP) for that long; its host is there, and silent, as behind a cut cable. Then both
must find each other again within a minute and exchange an update. Prints how long each step took.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import tempfile
import time
from pathlib import Path

import network_driver
from network_driver import network

from psyche_node.network.messages import Announced, Fetched, PeerDown, PeerUp, Publish, Want, WantEntry

BACK_SECONDS = 60.0


async def cut_off(folder: Path, seconds: float) -> None:
    network_driver.PATIENCE = BACK_SECONDS
    async with network(folder, 2) as (here, other):
        for process in (here, other):
            await process.members(here, other)
        await here.wait(PeerUp, slot=1)
        await other.wait(PeerUp, slot=0)
        other.process.send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        await here.wait(PeerDown, slot=1)
        print(f"noticed after {time.monotonic() - stopped:.1f} s", flush=True)
        here.events.clear()
        await asyncio.sleep(stopped + seconds - time.monotonic())
        assert not here.seen(PeerUp)
        other.process.send_signal(signal.SIGCONT)
        resumed = time.monotonic()
        await here.wait(PeerUp, slot=1)
        print(f"connected again {time.monotonic() - resumed:.1f} s after {seconds:.0f} s", flush=True)
        digest, length = other.store.put(bytes(60_000), 7)
        await other.ask(Publish(round=7, member=1, digest=digest.hex(), length=length))
        await here.wait(Announced, round=7, member=1)
        await here.ask(Want(round=7, wants=[WantEntry(member=1, digest=digest.hex(), length=length)]))
        await here.wait(Fetched, round=7, member=1)
        print(f"an update was announced and fetched after {time.monotonic() - resumed:.1f} s", flush=True)
        assert [await process.stop() for process in (here, other)] == [0, 0]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(cut_off(Path(folder), float(sys.argv[1]) if len(sys.argv) > 1 else 600.0))
