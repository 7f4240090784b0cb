"""Files over HTTP(S): streamed into a cache that is addressed by content, resumed where they broke off, and limited.

The cache holds ``SHA256.ENDING`` for each file, and for each URL what it was last time. Of a file that is here already
only a change is fetched; without a network the copy that is here serves.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from urllib.parse import urldefrag, urlsplit

import httpx2
from pydantic import BaseModel, ConfigDict, ValidationError

from psyche_node.data.errors import DataError
from psyche_node.data.files import sha256_file, write_atomically
from psyche_node.data.readers import SUFFIXES, suffix_of

log = logging.getLogger(__name__)
logging.getLogger("httpx2").setLevel(logging.WARNING)

_TRIES = 5
_FIRST_PAUSE = 0.2
_LONGEST_PAUSE = 5.0
_TIMEOUT = httpx2.Timeout(30.0, connect=10.0)
_FETCH_SECONDS = 60.0
_PIN = "sha256="


class _Entry(BaseModel):
    """What is known of a URL: its validator (ETag), and the SHA-256 of the whole file once it is here."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str
    etag: str = ""
    sha256: str = ""


class _Broken(Exception):
    """The transfer broke off; what has arrived is kept."""


def download(url: str, cache: Path, limit: int, headers: dict[str, str] | None = None) -> Path:
    """Return the file of ``url`` in ``cache``. ``URL#sha256=HEX`` pins its content, and then needs no second look.

    Raises:
        DataError: it cannot be had, is larger than ``limit`` bytes, or is not what is pinned.
    """
    address, fragment = urldefrag(url)
    pinned = _pinned(url, fragment)
    ending = suffix_of(urlsplit(address).path)
    if ending is None:
        raise DataError(f"{address}: no known kind of file. Name a URL whose path ends in one of {', '.join(SUFFIXES)}")
    cache.mkdir(parents=True, exist_ok=True)
    if pinned and (cache / f"{pinned}{ending}").is_file():
        return cache / f"{pinned}{ending}"
    key = hashlib.sha256(address.encode()).hexdigest()[:32]
    with _locked(cache / f"{key}.part") as part:
        digest = _Transfer(address, cache / f"{key}.json", part, limit, headers or {}).run(cache, ending)
        if pinned and digest != pinned:
            raise DataError(f"{address} has SHA-256 {digest}, not {pinned} as pinned. Ask who publishes it")
        return cache / f"{digest}{ending}"


def fetch(url: str, limit: int) -> bytes:
    """Return a small file. Raises DataError if it cannot be had in a minute, or has more than ``limit`` bytes."""
    found = bytearray()
    end = time.monotonic() + _FETCH_SECONDS
    try:
        with httpx2.stream("GET", url, timeout=_TIMEOUT, follow_redirects=True) as response:
            if response.status_code != 200:
                raise DataError(f"{url} answers {response.status_code}. Check the URL")
            for chunk in response.iter_bytes():
                found += chunk
                if time.monotonic() > end:
                    raise DataError(f"{url} took more than {_FETCH_SECONDS:.0f} s. Check the network")
                if len(found) > limit:
                    raise DataError(f"{url} has more than {limit} bytes. Check the URL")
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise DataError(f"{url} cannot be reached ({_words(error)}). Check the URL and the network") from error
    return bytes(found)


class _Transfer:
    """One URL on its way into ``part``, over as many connections as it takes."""

    def __init__(self, url: str, entry: Path, part: IO[bytes], limit: int, headers: dict[str, str]) -> None:
        self._url, self._path, self._part, self._limit, self._headers = url, entry, part, limit, headers
        self._entry = _read_entry(entry, url)

    def run(self, cache: Path, ending: str) -> str:
        """Return the file's SHA-256, when it is in ``cache``."""
        here = self._entry.sha256 and (cache / f"{self._entry.sha256}{ending}").is_file()
        before, pause = self._entry, _FIRST_PAUSE
        with httpx2.Client(timeout=_TIMEOUT, follow_redirects=True) as client:
            for attempt in range(1, _TRIES + 1):
                try:
                    if not self._fetch(client, unchanged=before.etag if here else ""):
                        return before.sha256
                    break
                except (httpx2.HTTPError, httpx2.InvalidURL, _Broken) as error:
                    if here:
                        log.warning("%s cannot be reached (%s): the copy of last time serves", self._url, _words(error))
                        # A new one may have been begun; the old one is what is here.
                        self._part.truncate(0)
                        self._remember(before)
                        return before.sha256
                    if attempt == _TRIES or isinstance(error, (httpx2.InvalidURL, httpx2.UnsupportedProtocol)):
                        raise DataError(
                            f"{self._url} cannot be had ({_words(error)}), after {attempt} attempts; "
                            f"{self._part.seek(0, os.SEEK_END)} bytes are kept. Check the network and try again, or "
                            "download it elsewhere and name the file"
                        ) from error
                    log.info("%s broke off (%s); again in %.1f s", self._url, _words(error), pause)
                    time.sleep(pause)
                    pause = min(2 * pause, _LONGEST_PAUSE)
        return self._keep(cache, ending)

    def _fetch(self, client: httpx2.Client, unchanged: str) -> bool:
        """Fetch what is missing. False: the server says that the copy of last time is still right."""
        have = self._part.seek(0, os.SEEK_END)
        headers = {"Accept-Encoding": "identity", **self._headers}
        if unchanged:
            headers["If-None-Match"] = unchanged
        elif have and self._entry.etag:
            headers |= {"Range": f"bytes={have}-", "If-Range": self._entry.etag}
        with client.stream("GET", self._url, headers=headers) as response:
            if response.status_code == 304 and unchanged:
                return False
            if response.status_code == 416:  # the part is as long as the file, or longer
                self._part.truncate(0)
                raise _Broken("the server has no more than is here; from the beginning")
            if response.status_code >= 500 or response.status_code == 429:
                raise _Broken(f"the server answers {response.status_code}")
            if response.status_code not in (200, 206):
                raise DataError(f"{self._url}: the server answers {response.status_code}. Check the URL and its access")
            resumed = response.headers.get("content-range", "").startswith(f"bytes {have}-")
            if response.status_code == 206 and not resumed:
                self._part.truncate(0)
                raise _Broken("the server sends another part than was asked for; from the beginning")
            if response.status_code == 200:
                have = 0
            self._part.seek(have)
            self._part.truncate()
            self._remember(_Entry(url=self._url, etag=_strong(response.headers.get("etag", ""))))
            length = response.headers.get("content-length", "")
            expected = have + int(length) if length.isdecimal() else None
            self._check(expected or 0)
            for chunk in response.iter_raw():
                have += len(chunk)
                self._check(have)
                self._part.write(chunk)
            self._part.flush()
            if expected is not None and have != expected:
                raise _Broken(f"{have} of {expected} bytes arrived")
        return True

    def _keep(self, cache: Path, ending: str) -> str:
        digest = sha256_file(Path(self._part.name))
        os.replace(self._part.name, cache / f"{digest}{ending}")
        self._remember(_Entry(url=self._url, etag=self._entry.etag, sha256=digest))
        return digest

    def _check(self, size: int) -> None:
        if size > self._limit:
            raise DataError(f"{self._url} has more than {self._limit} bytes. Raise the limit if it is to be that large")

    def _remember(self, entry: _Entry) -> None:
        self._entry = entry
        write_atomically(self._path, entry.model_dump_json().encode())


def _pinned(url: str, fragment: str) -> str:
    if not fragment:
        return ""
    digest = fragment.removeprefix(_PIN).lower()
    if not fragment.startswith(_PIN) or len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise DataError(f"{url}: what follows # must be {_PIN}, and 64 hexadecimal digits")
    return digest


@contextmanager
def _locked(path: Path) -> Iterator[IO[bytes]]:
    """The part file, opened to go on, while no other process writes it."""
    while True:
        path.touch()
        with path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                same = os.path.samestat(os.fstat(file.fileno()), path.stat())
            except FileNotFoundError:
                same = False
            if same:  # and not one that another process has finished and renamed meanwhile
                yield file
                return


def _read_entry(path: Path, url: str) -> _Entry:
    try:
        entry = _Entry.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return _Entry(url=url)
    return entry if entry.url == url else _Entry(url=url)


def _strong(etag: str) -> str:
    """A weak validator does not say that bytes are the same, so a file cannot be resumed by it."""
    return "" if etag.startswith("W/") else etag


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__
