"""Originals: who may have them, and that no request reaches another file than a photo of an opened gallery."""

import asyncio
import os
import urllib.parse
import zipfile
from functools import partial

import pytest
from PIL import Image

from webui import originals
from webui.originals import Originals, may_have_originals, original_link, read_original

LOCAL = {"host": "127.0.0.1:7860"}
HOME = "127.0.0.1"
NAMES = [
    "a.png",
    "b/c.jpg",
    "text.jpg",
    "link.png",
    "folder.png",
    "b/../../private.png",
    "outside/private.png",
    "gone.png",
]


@pytest.fixture
def root(tmp_path):
    """A gallery of two photos, beside a private one; other names lead out of it, or to no photo."""
    root = tmp_path / "pictures"
    (root / "b").mkdir(parents=True)
    Image.new("RGB", (9, 5), "red").save(root / "a.png")
    Image.new("RGB", (9, 5), "blue").save(root / "b" / "c.jpg")
    Image.new("RGB", (9, 5), "green").save(tmp_path / "private.png")
    (root / "text.jpg").write_text("confidential")
    (root / "link.png").symlink_to(tmp_path / "private.png")
    (root / "outside").symlink_to(tmp_path)
    (root / "folder.png").mkdir()
    return root


class FakeCatalog:
    def __init__(self, root):
        self.root = root

    def photo(self, run, gallery, name):
        if (run, gallery) != ("run", "photos") or name not in NAMES:
            raise KeyError(name)
        return self.root, name


def get(root, query, *, headers=LOCAL, client=HOME, method="GET", logged_in=True, path="/original", everyone=False):
    """Send a request; returns status, headers and body, with the paths that reached the application behind."""
    sent, reached = [], []

    async def application(scope, receive, send):
        reached.append(scope["path"])
        status = 401 if scope["path"].endswith("login_check") and not logged_in else 200
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b"application"})

    async def send(message):
        sent.append(message)

    allowed = partial(may_have_originals, local=True, everyone=everyone)
    scope = {"type": "http", "method": method, "path": path, "query_string": query.encode(), "client": (client, 1)}
    scope["headers"] = [(name.encode(), value.encode()) for name, value in headers.items()]
    asyncio.run(Originals(application, FakeCatalog(root), allowed)(scope, None, send))
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], {key.decode(): value.decode() for key, value in sent[0]["headers"]}, body, reached


def query_of(name, run="run", gallery="photos"):
    return original_link(run, gallery, name).partition("?")[2]


@pytest.mark.parametrize(("name", "media_type"), [("a.png", "image/png"), ("b/c.jpg", "image/jpeg")])
def test_photo_of_a_gallery_is_served_byte_by_byte_and_runs_nothing(root, name, media_type):
    status, headers, body, reached = get(root, query_of(name))
    assert status == 200 and body == (root / name).read_bytes() and reached == [originals.LOGIN_CHECK]
    assert headers["content-type"] == media_type and headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in headers["content-security-policy"] and "no-store" in headers["cache-control"]
    status, headers, body, _ = get(root, query_of(name), method="HEAD")
    assert status == 200 and body == b"" and int(headers["content-length"]) == (root / name).stat().st_size


@pytest.mark.parametrize("name", [*NAMES[2:], "b/c.jpg\0", "/etc/passwd", "../private.png", "", "b", "A.PNG"])
def test_links_folders_texts_and_other_names_are_not_served(root, name):
    status, _, body, _ = get(root, query_of(name))
    assert (status, body) == (404, b"not served")


@pytest.mark.parametrize(
    "query",
    [
        "",
        "name=a.png",
        "run=run&photos=photos&name=a.png&name=b/c.jpg",
        "run=run&photos=photos&name=a.png&path=/etc/passwd",
        query_of("a.png", run="other"),
        query_of("a.png", gallery="/etc"),
    ],
)
def test_incomplete_and_ambiguous_queries_are_not_served(root, query):
    assert get(root, query)[0] == 404


def test_visitor_must_be_logged_in(root):
    status, _, body, _ = get(root, query_of("a.png"), logged_in=False)
    assert status == 403 and b"log in" in body


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_other_methods_are_not_served(root, method):
    assert get(root, query_of("a.png"), method=method)[::3] == (404, [])


def test_other_addresses_reach_the_application(root):
    for path in ("/", "/original/", "/originals", "/gradio_api/info"):
        assert get(root, query_of("a.png"), path=path)[3] == [path]


@pytest.mark.parametrize(
    ("headers", "client"),
    [
        (LOCAL, "192.0.2.7"),
        (LOCAL, "::ffff:192.0.2.7"),
        (LOCAL, ""),
        ({"host": "photos.example.com"}, HOME),  # a proxy, or a web site whose name leads to this machine
        ({"host": "127.0.0.1.example.com:7860"}, HOME),
        ({}, HOME),
        *((LOCAL | {name: "x"}, HOME) for name in originals.FORWARDED),
        (LOCAL | {"referer": "https://photos.example.com/"}, HOME),
        (LOCAL | {"sec-fetch-site": "cross-site"}, HOME),
    ],
)
def test_visitor_from_elsewhere_gets_no_original_unless_all_may(root, headers, client):
    assert get(root, query_of("a.png"), headers=headers, client=client)[::3] == (404, [])
    status = get(root, query_of("a.png"), headers=headers, client=client, everyone=True)[0]
    assert status == (404 if "sec-fetch-site" in headers else 200)  # no other site embeds them


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:7860", "LOCALHOST", "[::1]:7860", "[::1]"])
def test_addresses_of_this_machine_are_local(host):
    for client in ("127.0.0.1", "127.0.0.5", "::1", "::ffff:127.0.0.1"):
        headers = {"host": host, "referer": f"http://{host}/", "sec-fetch-site": "same-origin"}
        assert may_have_originals(headers, client, local=True, everyone=False)
        assert not may_have_originals(headers, client, local=False, everyone=False)


def test_original_in_an_archive_is_served_and_a_large_one_is_not(root, tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.write(root / "a.png", "x/a.png")
        archive.writestr("x/t.png", "confidential")
    content = (root / "a.png").read_bytes()
    assert read_original(tmp_path, "photos.zip/x/a.png") == (content, "image/png")
    with pytest.raises(ValueError):
        read_original(tmp_path, "photos.zip/x/t.png")
    monkeypatch.setattr(originals, "MAX_ORIGINAL", 20)
    with pytest.raises(ValueError, match="MB"):
        read_original(root, "a.png")


def test_pipe_is_not_waited_for(root):
    os.mkfifo(root / "gone.png")
    assert get(root, query_of("gone.png"))[0] == 404


def test_link_contains_every_name_unchanged():
    name = "a b/&name=c#?%2e%2e/ü\u202e.jpg"
    fields = urllib.parse.parse_qs(original_link("runs/x", "my photos", name).partition("?")[2])
    assert fields == {"run": ["runs/x"], "photos": ["my photos"], "name": [name]}
