"""Messages: requests, answers, and the Hub's errors with the headers that clients read."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO
from urllib.parse import parse_qsl

CHUNK_SIZE = 1 << 20


class HubError(Exception):
    """An answer other than success. `code` becomes `X-Error-Code`, by which clients choose their exception."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict | None = None, **body):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | (headers or {})
        self.body = {"error": message} | body


class Body:
    """The body of a request, read from the connection on demand."""

    def __init__(self, stream: BinaryIO, num_bytes: int):
        self.stream = stream
        self.num_bytes = num_bytes
        self.num_bytes_left = num_bytes

    def chunks(self):
        """Yield the rest, in pieces that fit in memory.

        Raises:
            ConnectionError: the client went away before the end.
        """
        while self.num_bytes_left:
            chunk = self.stream.read(min(CHUNK_SIZE, self.num_bytes_left))
            if not chunk:
                raise ConnectionError(f"the client went away, {self.num_bytes_left} bytes before the end of the body")
            self.num_bytes_left -= len(chunk)
            yield chunk

    def drain(self) -> None:
        """Read the rest: the next request on the connection comes after it."""
        for _ in self.chunks():
            pass


@dataclass(frozen=True)
class Request:
    method: str
    path: str  # as received, quoted: `refs%2Fpr%2F1` is one component
    query: str
    headers: dict[str, str]  # lower-case names
    body: Body

    @property
    def token(self) -> str | None:
        authorization = self.headers.get("authorization")
        return None if authorization is None else authorization.removeprefix("Bearer ")

    @property
    def parameters(self) -> dict[str, str]:
        return dict(parse_qsl(self.query, keep_blank_values=True))

    def content(self) -> bytes:
        return b"".join(self.body.chunks())

    def json(self) -> dict:
        return json.loads(self.content() or b"{}")


@dataclass(frozen=True)
class Answer:
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


def json_answer(content, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
    body = json.dumps(content).encode()
    return Answer(status, {"Content-Type": "application/json; charset=utf-8"} | (headers or {}), body)


def error_answer(error: HubError) -> Answer:
    return json_answer(error.body, error.status, error.headers)


def file_answer(request: Request, path: Path, headers: dict[str, str]) -> Answer:
    """Answer with a file, or with the requested range (`bytes=2-5`, `bytes=2-`, `bytes=-4`).

    Raises:
        HubError: 416, the range begins past the end.
    """
    content = path.read_bytes()
    size = len(content)
    headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"} | headers
    asked = request.headers.get("range")
    if asked is None:
        return Answer(200, headers, content)
    first, last = asked.removeprefix("bytes=").split("-")
    start = int(first) if first else max(0, size - int(last))
    end = min(size, int(last) + 1) if first and last else size
    if start >= size:
        raise HubError(416, "Range Not Satisfiable", headers={"Content-Range": f"bytes */{size}"})
    return Answer(206, headers | {"Content-Range": f"bytes {start}-{end - 1}/{size}"}, content[start:end])
