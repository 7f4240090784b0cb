"""A web server with files for tests: ranges, validators, and the faults of real ones."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Web:
    """``files`` by path. ``break_after``: so many bytes into each answer the connection drops, ``breaks`` times."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.break_after, self.breaks = 0, 0
        self.status = 200
        self.asked: list[tuple[str, str, str]] = []
        """(path, Range, status) of each request."""
        self.url = ""


@contextmanager
def served(files: dict[str, bytes]) -> Iterator[Web]:
    web = Web(files)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

        def do_GET(self) -> None:
            data = web.files.get(self.path.partition("?")[0])
            wanted = self.headers.get("Range", "")
            status, start = web.status, 0
            if status == 200 and data is None:
                status = 404
            body = data or b""
            etag = f'"{hashlib.md5(body).hexdigest()}"'
            if status == 200 and self.headers.get("If-None-Match") == etag:
                status = 304
            elif status == 200 and wanted and self.headers.get("If-Range") == etag:
                start = int(wanted.removeprefix("bytes=").rstrip("-"))
                status = 206 if start < len(body) else 416
            web.asked.append((self.path, wanted, str(status)))
            self.send_response(status)
            part = body[start:] if status in (200, 206) else b""
            self.send_header("ETag", etag)
            self.send_header("Content-Length", str(len(part)))
            if status == 206:
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            self.end_headers()
            if web.breaks and web.break_after < len(part):
                web.breaks -= 1
                part, self.close_connection = part[: web.break_after], True
            self.wfile.write(part)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    web.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield web
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
