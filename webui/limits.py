"""An ASGI middleware in front of Gradio: which addresses exist, how large a request may be, and which files it names.

Gradio sees a request only once all of it has arrived and passed these checks.
"""

import asyncio
import json
import math
import re
import sys
import tempfile
import urllib.parse
from http import HTTPStatus
from pathlib import Path

from runtime.text import display_text
from webui.login import Pauses
from webui.multipart import form_checker
from webui.request_body import Disconnected, Refused, drain, receive_body, replay, respond
from webui.temp_folder import MAX_STORED, stored_bytes, uploaded_file
from webui.uploads import check_photos

MAX_UPLOAD = 20_000_000  # bytes of all files of a request
MAX_BYTES = {"upload": MAX_UPLOAD + 20_000, "json": 4_000_000, "login": 8_000}  # of a request; JSON may escape letters
MAX_CHARACTERS, MAX_VALUES, MAX_DEPTH = 210_000, 1_000, 8  # of all texts, values and levels of a JSON request
IN_MEMORY = 2**20  # bytes of a request; larger ones wait in the page's folder
MAX_WAIT = 5  # seconds that a login waits after wrong guesses; beyond, it is refused
MAX_ADDRESS = 4_000  # characters of the path and of the query
FILE_KEYS = {"path", "url", "is_stream", "orig_name", "mime_type", "meta"}  # of Gradio's description of a file

API = "/gradio_api"
POSTS = {f"{API}/upload": "upload", "/login": "login"}  # path -> what the request contains
JSON_POSTS = re.compile(rf"{API}/(?:queue/join|(?:call|call/v2|run|api)/\w+|cancel|reset)")
FILE = re.compile(rf"(?:{API})?/file(?:=|/)(.*)", re.DOTALL)
GETS = re.compile(
    rf"{API}/(?:info|openapi\.json|config|queue/(?:data|status)|heartbeat/[\w-]+|upload_progress|startup-events"
    r"|theme\.css|user|login_check|token|app_id|call/\w+/[\w-]+)/?"
)
# Outside of the API Gradio serves the page and its own files, and these, which the page does not use.
UNUSED = re.compile(r"/(?:monitoring|dev|proxy=|stream|custom_component|component_server|vibe-|runs?\b)")


class RequestGuard:
    """Check requests before `app` sees them.

    folder: where uploads are stored; only its files can be named in a request or fetched. pauses: of the login.
    """

    def __init__(self, app, folder: Path, pauses: Pauses | None = None):
        self.app, self.folder, self.pauses = app, folder, pauses or Pauses()
        self.decoding = asyncio.Semaphore(1)  # of uploads: one photo at a time is decoded

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        started = answered = ended = False

        async def tracked_receive():
            nonlocal ended
            message = await receive()
            ended = not message.get("more_body", False)
            return message

        async def tracked_send(message):
            nonlocal started, answered
            started = True
            answered = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        try:
            await self._serve(scope, tracked_receive, tracked_send)
        except Disconnected:
            return
        except Refused as refused:
            if not ended and scope["method"] not in ("GET", "HEAD"):
                await drain(receive)
            if not started:
                await respond(send, refused)
        except Exception as error:  # an error of Gradio for a request that it does not understand
            if type(error).__name__ == "ClientDisconnect":
                return
            kind, path = type(error).__name__, scope["path"]
            print(display_text(f"{scope['method']} {path[:80]}: {kind}: {error}", 200), file=sys.stderr, flush=True)
            if not started:
                await respond(send, Refused(400, "this request is not understood"))
            elif not answered:
                await send({"type": "http.response.body", "body": b""})

    async def _serve(self, scope, receive, send):
        path = scope["path"].removeprefix(scope.get("root_path") or "")
        if len(path) > MAX_ADDRESS or len(scope.get("query_string", b"")) > MAX_ADDRESS:
            raise Refused(414, "the address is too long")
        if scope["method"] in ("GET", "HEAD"):
            self._check_get(path, scope.get("query_string", b"").decode("latin-1"))
            return await self.app(scope, receive, send)
        if scope["method"] != "POST":
            raise Refused(405, "this method is not served")
        path = path.rstrip("/")
        kind = "json" if JSON_POSTS.fullmatch(path) else POSTS.get(path)
        if kind is None:
            raise Refused(404, "not served")
        if kind == "upload" and await asyncio.to_thread(stored_bytes, self.folder) > MAX_STORED:
            raise Refused(507, "the page's folder is full: older uploads are deleted within an hour")
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        check = form_checker(headers, MAX_UPLOAD) if kind == "upload" else None
        with tempfile.SpooledTemporaryFile(IN_MEMORY, dir=self.folder) as body:  # has no name: nothing remains of it
            await receive_body(receive, headers, body, MAX_BYTES[kind], check)
            if kind == "upload":
                async with self.decoding:
                    await asyncio.to_thread(check_photos, body, headers, self.folder)
            if kind == "json":
                checked = check_json(body.read(), self.folder)
                body.seek(0)
                body.truncate()
                body.write(checked)
            scope = scope | {"headers": _new_headers(scope["headers"], body.seek(0, 2), kind)}
            body.seek(0)
            serve = self._log_in if kind == "login" else self.app
            await serve(scope, replay(body, receive), send)

    def _check_get(self, path, query):
        if "deep_link" in urllib.parse.parse_qs(query, keep_blank_values=True):  # names files that Gradio would load
            raise Refused(404, "not served")
        if match := FILE.fullmatch(path):
            try:
                uploaded_file(match[1], self.folder)
            except ValueError:
                raise Refused(403, "not served") from None
        elif (path.startswith(f"{API}/") and not GETS.fullmatch(path)) or UNUSED.match(path):
            raise Refused(404, "not served")

    async def _log_in(self, scope, receive, send):
        """Pass on a login after the pause that earlier wrong ones cost."""
        address = (scope.get("client") or ("",))[0]
        wait = self.pauses.reserve(address, MAX_WAIT)
        if wait > MAX_WAIT:
            seconds = str(math.ceil(wait))
            raise Refused(429, f"too many wrong passwords: try again in {seconds} s", {"retry-after": seconds})
        await asyncio.sleep(wait)

        async def forgiving_send(message):
            if message["type"] == "http.response.start" and message["status"] == HTTPStatus.OK:
                self.pauses.forgive(address)
            await send(message)

        await self.app(scope, receive, forgiving_send)


def _new_headers(headers, length, kind):
    """Return the headers with the length of the body that Gradio reads; JSON is always called JSON."""
    replaced = {b"content-length": str(length).encode()}
    if kind == "json":
        replaced[b"content-type"] = b"application/json"
    removed = {*replaced, b"transfer-encoding"}
    return [(name, value) for name, value in headers if name.lower() not in removed] + list(replaced.items())


def check_json(content: bytes, folder: Path) -> bytes:
    """Return the JSON that was checked, written anew: Gradio cannot read it in another way. Raises Refused."""
    try:
        value = json.loads(content, parse_constant=_no_constant)
        if not isinstance(value, dict):
            raise ValueError("the request must be a JSON object")
        check_values(value, folder)
        return json.dumps(value).encode()
    except RecursionError:
        raise Refused(400, f"the request has more than {MAX_DEPTH} levels") from None
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise Refused(400, "the request is not valid JSON") from None
    except ValueError as error:
        raise Refused(400, display_text(error, 300)) from None


def check_values(value: object, folder: Path) -> None:
    """Raise ValueError for a JSON value with too much text, or with a file that is no upload in `folder`."""
    pending, characters, values = [(value, 0)], 0, 0
    while pending:
        item, depth = pending.pop()
        values += 1
        if values > MAX_VALUES or depth > MAX_DEPTH:
            raise ValueError(f"the request has more than {MAX_VALUES:,} values, or more than {MAX_DEPTH} levels")
        if isinstance(item, str):
            characters += len(item)
        elif isinstance(item, dict):
            if FILE_KEYS & item.keys():
                uploaded_file(item.get("path"), folder)
            characters += sum(map(len, item))
            pending += [(child, depth + 1) for child in item.values()]
        elif isinstance(item, list):
            pending += [(child, depth + 1) for child in item]
        if characters > MAX_CHARACTERS:
            raise ValueError(f"the request has more than {MAX_CHARACTERS:,} characters of text")


def _no_constant(name):
    raise ValueError(f"{name} is not a number that is accepted")
