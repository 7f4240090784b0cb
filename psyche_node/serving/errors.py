"""What goes wrong in a server: with itself, and with what a client asks."""

from __future__ import annotations

from typing import Any


class ServeError(Exception):
    """The server cannot start: its address is taken, or its key file cannot be used."""


class ApiError(Exception):
    """A request that is answered with an error, in the form of OpenAI's interface.

    Attributes:
        status: of HTTP.
        kind: OpenAI's ``type``, such as invalid_request_error.
        param: the parameter it is about.
        code: a word for programs.
        headers: to send along.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """The JSON object that tells the client. What it quotes of a request may be no Unicode."""
        message = str(self).encode(errors="backslashreplace").decode()
        return {"error": {"message": message, "type": self.kind, "param": self.param, "code": self.code}}
