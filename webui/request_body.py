"""Receive the body of an ASGI request within limits, replay it to the application, and answer what is refused."""

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import BinaryIO

MAX_SECONDS = 600  # for a request to arrive
DRAIN_BYTES, DRAIN_SECONDS = 200_000_000, 10  # read and dropped after a refusal, so that the client sees the answer
CHUNK = 2**18  # bytes


class Refused(Exception):
    """A request that is answered with a status and one line."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.headers = status, headers or {}


class Disconnected(Exception):
    """The client left before its request was complete."""


async def receive_body(
    receive: Callable, headers: Mapping[str, str], file: BinaryIO, max_bytes: int, check: Callable | None
) -> None:
    """Copy the body of a request into a file. check: called with each chunk; raises Refused.

    Raises Refused as soon as the body is too large, by its header or in fact, or takes too long.
    """
    length = headers.get("content-length", "0")
    if not length.isdecimal() or len(length) > 15:
        raise Refused(400, "the length of the request is not a number")
    too_large = Refused(413, f"the request is larger than {max_bytes / 1e6:g} MB")
    if int(length) > max_bytes:
        raise too_large
    received, clock = 0, asyncio.get_running_loop().time
    deadline, more = clock() + MAX_SECONDS, True
    while more:
        try:
            message = await asyncio.wait_for(receive(), max(deadline - clock(), 0.01))
        except TimeoutError:
            raise Refused(408, f"the request took more than {MAX_SECONDS} s to arrive") from None
        if message["type"] == "http.disconnect":
            raise Disconnected
        chunk = message.get("body", b"")
        received += len(chunk)
        if received > max_bytes:
            raise too_large
        if check is not None:
            check(chunk)
        file.write(chunk)
        more = message.get("more_body", False)
    file.seek(0)


async def drain(receive: Callable) -> None:
    """Read the rest of a refused request without keeping it: a client that still sends would miss the answer."""
    clock = asyncio.get_running_loop().time
    received, deadline, more = 0, clock() + DRAIN_SECONDS, True
    while more and received < DRAIN_BYTES and clock() < deadline:
        try:
            message = await asyncio.wait_for(receive(), max(deadline - clock(), 0.01))
        except TimeoutError:
            return
        received += len(message.get("body", b""))
        more = message["type"] == "http.request" and message.get("more_body", False)


def replay(file: BinaryIO, receive: Callable) -> Callable:
    """Return an ASGI `receive` that reads the body from a file, and then waits for the client to leave."""
    done = False

    async def replayed():
        nonlocal done
        if done:
            return await receive()
        chunk = file.read(CHUNK)
        done = len(chunk) < CHUNK
        return {"type": "http.request", "body": chunk, "more_body": not done}

    return replayed


async def respond(send: Callable, refused: Refused) -> None:
    """Answer a refused request: as text where people read it as it is, else as JSON like Gradio's errors."""
    text, plain = str(refused), refused.status in (403, 404, 415)
    body = text.encode() if plain else json.dumps({"detail": text, "error": text}).encode()
    headers = {"content-type": "text/plain; charset=utf-8" if plain else "application/json", **refused.headers}
    headers["content-length"] = str(len(body))
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
