"""The original of a photo that was found, in full size: for visitors on this machine, or for all with --originals.

An ASGI middleware behind RequestGuard. A photo is named by run, gallery and file name, which must be one of a gallery
that was searched; no path of a request is ever joined to a folder.
"""

import asyncio
import ipaddress
import os
import stat
import urllib.parse
from collections.abc import Callable, Mapping
from pathlib import Path

from data.image_io import open_image
from data.storage import open_regular, read_bytes
from runtime.text import display_text
from webui.catalog import Catalog
from webui.request_body import Refused, respond

ADDRESS = "/original"
LOGIN_CHECK = "/gradio_api/login_check"  # Gradio answers 200 to visitors who are logged in, or without a password
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
FORWARDED = ("forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-real-ip")  # headers of a proxy
MAX_ORIGINAL = 200_000_000  # bytes
CHUNK = 2**20  # bytes
NOT_SERVED = "not served"


class Originals:
    """Serve GET /original to visitors who may have originals, and pass all other requests on.

    may_have_originals: the function of that name, with its settings.
    """

    def __init__(self, app, catalog: Catalog, may_have_originals: Callable[[Mapping[str, str], str], bool]):
        self.app, self.catalog, self.may_have_originals = app, catalog, may_have_originals

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or scope["path"].removeprefix(scope.get("root_path") or "") != ADDRESS:
            return await self.app(scope, receive, send)
        try:
            headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
            client = (scope.get("client") or ("",))[0]
            if scope["method"] not in ("GET", "HEAD") or not self.may_have_originals(headers, client):
                raise Refused(404, NOT_SERVED)
            if not await self._is_logged_in(scope, receive):
                raise Refused(403, "log in first")
            query = scope.get("query_string", b"").decode("latin-1")
            await self._send_photo(await asyncio.to_thread(self._read, query), scope["method"], send)
        except Refused as refused:
            await respond(send, refused)

    async def _is_logged_in(self, scope, receive):
        """Ask Gradio itself, so that there is one login."""
        status = 0

        async def note_status(message):
            nonlocal status
            status = message.get("status", status)

        path = {"path": LOGIN_CHECK, "raw_path": LOGIN_CHECK.encode(), "query_string": b"", "method": "GET"}
        await self.app(scope | path | {"root_path": ""}, receive, note_status)
        return status == 200

    def _read(self, query):
        """Return the content, the media type and the name of the photo that a query names. Raises Refused."""
        fields = urllib.parse.parse_qs(query, keep_blank_values=True)
        if any(len(values) > 1 for values in fields.values()) or fields.keys() != {"run", "photos", "name"}:
            raise Refused(404, NOT_SERVED)
        try:
            root, name = self.catalog.photo(*(fields[key][0] for key in ("run", "photos", "name")))
            return *read_original(root, name), name.rpartition("/")[2]
        except (KeyError, OSError, ValueError):
            raise Refused(404, NOT_SERVED) from None

    async def _send_photo(self, photo, method, send):
        content, media_type, name = photo
        quoted = urllib.parse.quote(display_text(name), safe="")
        headers = {
            "content-type": media_type,
            "content-length": str(len(content)),
            "content-disposition": f"inline; filename*=UTF-8''{quoted}",
            "content-security-policy": "sandbox; default-src 'none'; img-src 'self'; style-src 'unsafe-inline'",
            "x-content-type-options": "nosniff",
            "cross-origin-resource-policy": "same-origin",
            "cache-control": "private, no-store",
            "referrer-policy": "no-referrer",
        }
        encoded = [(key.encode(), value.encode()) for key, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": encoded})
        starts = range(0, 0 if method == "HEAD" else len(content), CHUNK)
        for start in starts:
            await send({"type": "http.response.body", "body": content[start : start + CHUNK], "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def may_have_originals(headers: Mapping[str, str], client: str, *, local: bool, everyone: bool) -> bool:
    """Return whether a request may get originals, by its headers and the address of its client.

    everyone: every visitor may. local: visitors on this machine may, who come through no proxy; the page then listens
    on 127.0.0.1. The name in the Host header is checked, so that a web site whose name leads to 127.0.0.1 gets none.
    So is the page that the request comes from, as far as the browser names it.
    """
    if everyone:
        return headers.get("sec-fetch-site", "none") in ("same-origin", "none")
    if not local or any(name in headers for name in FORWARDED):
        return False
    if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        return False
    if (referrer := headers.get("referer")) and _host_name(urllib.parse.urlsplit(referrer).netloc) not in LOCAL_NAMES:
        return False
    return _is_loopback(client) and _host_name(headers.get("host", "")) in LOCAL_NAMES


def _host_name(host):
    """Return the name or address of a Host header without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.rpartition(":")[0].lower() if host.count(":") == 1 else host.lower()


def _is_loopback(address):
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


def original_link(run: str, gallery: str, name: str) -> str:
    """Return the address of a photo's original, relative to the page."""
    return f"{ADDRESS[1:]}?{urllib.parse.urlencode({'run': run, 'photos': gallery, 'name': name})}"


def read_original(root: Path, name: str) -> tuple[bytes, str]:
    """Return the content of a gallery's photo and its media type.

    Raises OSError or ValueError for what is no photo in that folder: a link out of it, another kind of file, content
    that is no image, more than MAX_ORIGINAL bytes.
    """
    path = root / name
    resolved, folder = Path(os.path.realpath(path)), Path(os.path.realpath(root))
    if ".." in Path(name).parts or not resolved.is_relative_to(folder):
        raise ValueError("the photo is not in the gallery's folder")
    if os.path.lexists(resolved):
        found = os.lstat(resolved)
        with open_regular(resolved) as file:
            opened = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode) or not os.path.samestat(found, opened):
                raise ValueError("the photo was replaced while it was opened")
            content = file.read(MAX_ORIGINAL + 1)
    else:
        content = read_bytes(resolved, MAX_ORIGINAL + 1)  # in an archive
    if len(content) > MAX_ORIGINAL:
        raise ValueError(f"the photo has more than {MAX_ORIGINAL / 1e6:.0f} MB")
    return content, _media_type(resolved)


def _media_type(path):
    """Return the media type of an image's content, whatever its name is. Raises ValueError for any other file."""
    from PIL import Image

    try:
        with open_image(path) as image:
            media_type = Image.MIME.get(image.format, "")
    except Exception as error:  # decoders raise errors of many types
        raise ValueError(str(error)) from None
    if not media_type.startswith("image/"):
        raise ValueError("not an image")
    return media_type
