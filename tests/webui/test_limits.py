"""The middleware in front of Gradio, around an application that notes what reaches it."""

import asyncio
import io
import json
import random

import pytest
from PIL import Image

from webui import limits, request_body
from webui.limits import API, RequestGuard

FORM = "multipart/form-data; boundary=zz"


class Application:
    """An ASGI application that reads each request and answers 200."""

    def __init__(self):
        self.requests = []

    async def __call__(self, scope, receive, send):
        body, more = b"", scope["method"] == "POST"
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        self.requests.append((scope["path"], body))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"reached"})


def request(folder, method, path, chunks=(b"",), *, app=None, query=b"", kind="application/json", length=None):
    """Send a request through the guard; return status, answer, what reached `app`, unread chunks."""
    app = app or Application()
    headers = [(b"content-type", kind.encode())]
    headers += [] if length is None else [(b"content-length", str(length).encode())]
    scope = {"type": "http", "method": method, "path": path, "query_string": query, "headers": headers}
    scope["client"] = ("192.0.2.7", 1)
    pending, sent = list(chunks), []

    async def receive():
        body = pending.pop(0)
        return {"type": "http.request", "body": body, "more_body": bool(pending)}

    async def send(message):
        sent.append(message)

    asyncio.run(RequestGuard(app, folder)(scope, receive, send))
    answer = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], answer.decode(), getattr(app, "requests", None), pending


def post_json(folder, value, path=f"{API}/call/search_photos"):
    content = value if isinstance(value, bytes) else json.dumps(value).encode()
    return request(folder, "POST", path, [content])


def form(*parts):
    """A form of (disposition, content) pairs."""
    body = b"".join(b"--zz\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n" % part for part in parts)
    return body + b"--zz--\r\n"


def photo_bytes(side, kind="PNG"):
    """The bytes of a photo with random pixels, which do not compress."""
    file = io.BytesIO()
    Image.frombytes("RGB", (side, side), random.Random(side).randbytes(3 * side * side)).save(file, kind)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "photo.jpg").write_bytes(b"uploaded")
    (tmp_path / "private.png").write_bytes(b"confidential")
    return tmp_path / "files"


@pytest.mark.parametrize(
    "path", ["call/search_photos", "call/v2/about", "run/other_name", "api/x", "queue/join", "call/a/"]
)
@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize(
    "file",
    [
        {"path": "PARENT/private.png"},
        {"path": "PARENT/files/../private.png", "meta": {"_type": "gradio.FileData"}},
        {"path": "/dev/ptmx"},
        {"path": "/proc/self/environ", "orig_name": "a.png"},
        {"path": "http://192.0.2.1/x.png"},
        {"path": "FTP://192.0.2.1/x.png", "meta": {"_type": "gradio.FileData"}},
        {"url": "https://192.0.2.1/x.png"},
        {"path": None, "url": "hf://datasets/x"},
        {"path": "data:image/png;base64,AAAA"},
        {"path": ["PARENT/private.png"]},
        {"meta": {"_type": "gradio.FileData"}},
    ],
)
def test_only_uploaded_files_can_be_named_wherever_they_stand(folder, path, position, file):
    text = json.dumps(file).replace("PARENT", str(folder.parent))
    data = ["a", "b"]
    data[position] = [{"deeper": json.loads(text)}]
    status, answer, reached, _ = post_json(folder, {"data": data}, f"{API}/{path}")
    assert status == 400 and not reached
    assert "photo" in answer and "confidential" not in answer and str(folder) not in answer


def test_uploaded_file_reaches_the_application_as_it_was_checked(folder):
    value = {"data": [{"path": str(folder / "photo.jpg"), "meta": {"_type": "gradio.FileData"}}, "http://is.text"]}
    status, _, reached, _ = post_json(folder, value)
    assert status == 200 and json.loads(reached[0][1]) == value


def test_repeated_key_of_json_is_read_once(folder):
    text = f'{{"data": [{{"path": "{folder}/../private.png", "path": "{folder}/photo.jpg"}}]}}'
    _, _, reached, _ = post_json(folder, text.encode())
    assert reached[0][1].count(b'"path"') == 1 and b"private" not in reached[0][1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1", "not valid JSON"),
        (b"[1]", "must be a JSON object"),
        (b'{"data": NaN}', "NaN"),
        (b'{"data": "\xff"}', "not valid JSON"),
        (b'{"data": ' + b"[" * 100_000, "levels"),
        (json.dumps({"data": [[[[[[[[[1]]]]]]]]]}).encode(), "levels"),
        (json.dumps({"data": list(range(1_001))}).encode(), "1,000 values"),
        (json.dumps({"data": ["y" * 210_001]}).encode(), "210,000 characters"),
        (json.dumps({"k" * 210_001: 1}).encode(), "210,000 characters"),
        (b'{"data": ' + b"9" * 5_000 + b"}", ""),
        (b" " * 4_000_001, "larger than 4 MB"),
    ],
)
def test_unusual_json_is_refused_in_one_line(folder, content, message):
    status, answer, reached, _ = post_json(folder, content)
    assert status in (400, 413) and not reached and message in answer and "\n" not in answer


@pytest.mark.parametrize("length", [None, 60_000_000])
def test_upload_is_refused_by_its_length_and_while_it_arrives(folder, length):
    chunks = [form((b"name=files; filename=a.jpg", b""))[:-8]] + [bytes(1_000_000)] * 60
    status, answer, reached, _ = request(folder, "POST", f"{API}/upload", chunks, kind=FORM, length=length)
    assert status == 413 and "20" in answer and "MB" in answer and not reached
    assert [path.name for path in folder.iterdir()] == ["photo.jpg"]


def test_endless_upload_is_not_read_to_its_end(folder, monkeypatch):
    monkeypatch.setattr(request_body, "DRAIN_BYTES", 5_000_000)
    chunks = [bytes(1_000_000)] * 100
    status, _, _, unread = request(folder, "POST", f"{API}/upload", chunks, kind=FORM, length=99_000_000)
    assert status == 413 and len(unread) > 80


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (form(*[(b"name=files; filename=a.jpg", bytes(11_000_000))] * 2), 413, "MB"),
        (form((b"name=files", bytes(3_000_000))), 400, "without a file"),
        (form(*[(b"name=files; filename=a.jpg", b"")] * 21), 400, "20 files"),
        (form((b"name=files; filename=" + b"n" * 9_000, b"")), 400, "the upload"),  # python-multipart has a limit, too
        (b"no form", 400, "valid form"),
    ],
)  # fmt: skip
def test_form_that_is_not_a_few_files_is_refused(folder, body, status, message):
    got, answer, reached, _ = request(folder, "POST", f"{API}/upload", [body], kind=FORM)
    assert (got, reached) == (status, []) and message in answer


def test_ordinary_upload_passes_unchanged(folder):
    body = form((b'name=files; filename="a.jpg"', photo_bytes(700)))
    chunks = [body[start : start + 65_536] for start in range(0, len(body), 65_536)]
    status, _, reached, _ = request(folder, "POST", f"{API}/upload", chunks, kind=FORM, length=len(body))
    assert status == 200 and reached == [(f"{API}/upload", body)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jpg", b"this is no photo", "a.jpg is not a photo that can be read"),
        ("b.jpg", photo_bytes(64, "JPEG")[:2_000], "b.jpg is not a photo that can be read"),
        ("c.png", photo_bytes(64)[:-3_000], "c.png is not a photo that can be read"),
        ("d.png", b"", "d.png is not a photo that can be read"),
        ("../../e.svg", b"<svg/>", "e.svg is not a photo that can be read"),
    ],
)
@pytest.mark.parametrize("others", [0, 2])
def test_broken_upload_is_refused_when_it_arrives(folder, name, content, message, others):
    good = [(b"name=files; filename=good.png", photo_bytes(8))] * others
    body = form(*good, (b'name=files; filename="%s"' % name.encode(), content))
    status, answer, reached, _ = request(folder, "POST", f"{API}/upload", [body], kind=FORM)
    assert status == 415 and answer.startswith(message) and "\n" not in answer and str(folder) not in answer
    assert not reached and [path.name for path in folder.iterdir()] == ["photo.jpg"]


def test_upload_into_a_full_folder_is_refused(folder, monkeypatch):
    monkeypatch.setattr(limits, "MAX_STORED", 5)
    body = form((b"name=files; filename=a.jpg", b"1"))
    status, answer, reached, _ = request(folder, "POST", f"{API}/upload", [body], kind=FORM)
    assert status == 507 and "full" in answer and not reached


def test_upload_whose_client_leaves_is_not_kept(folder):
    sent = []

    async def receive():
        return {"type": "http.disconnect"}

    scope = {"type": "http", "method": "POST", "path": f"{API}/upload"}
    scope["headers"] = [(b"content-type", FORM.encode())]
    asyncio.run(RequestGuard(Application(), folder)(scope, receive, sent.append))
    assert not sent and [path.name for path in folder.iterdir()] == ["photo.jpg"]


@pytest.mark.parametrize(
    "path",
    [
        *("proxy=http://192.0.2.1/", "stream/a/b/c/playlist.m3u8", "custom_component/1/a/b/c", "component_server"),
        *("file=/etc/passwd", "file=http://192.0.2.1/x", "file=/dev/ptmx", "file/etc/passwd"),
        *("deep_link", "vibe-code", "runs", "nothing"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"])
def test_endpoints_that_the_page_does_not_use_are_not_served(folder, path, method):
    status, _, reached, _ = request(folder, method, f"{API}/{path}")
    assert status in (403, 404, 405) and not reached


def test_pages_and_uploads_are_served_and_links_out_of_the_folder_are_not(folder):
    (folder / "link.png").symlink_to(folder.parent / "private.png")
    for path in ("/", "/config", "/assets/index.js", f"{API}/info", f"{API}/file={folder}/photo.jpg"):
        assert request(folder, "GET", path)[0] == 200, path
    assert request(folder, "GET", f"{API}/file={folder}/link.png")[0] == 403
    assert request(folder, "GET", "/monitoring/summary")[0] == 404
    assert request(folder, "GET", "/", query=b"a=1&deep%5Flink=../x")[0] == 404
    assert request(folder, "GET", "/" + "a" * 5_000)[0] == 414


def test_error_of_the_application_is_one_line_and_no_traceback(folder, capsys):
    async def fail(scope, receive, send):
        raise KeyError("line one\nline two \x1b[31m")

    status, answer, _, _ = request(folder, "GET", "/", app=fail)
    printed = capsys.readouterr().err
    assert status == 400 and "not understood" in answer
    assert printed.count("\n") == 1 and "KeyError" in printed and "\x1b" not in printed


def test_wrong_passwords_are_refused_after_a_while(folder, monkeypatch):
    monkeypatch.setattr(limits, "MAX_WAIT", 0)
    guard = RequestGuard(Application(), folder)
    scope = {"type": "http", "method": "POST", "path": "/login", "headers": [], "client": ("192.0.2.7", 1)}
    statuses = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        statuses.extend([message["status"]] if "status" in message else [])

    async def refuse(scope, receive, send):
        await send({"type": "http.response.start", "status": 400, "headers": []})

    guard.app = refuse
    for _ in range(3):
        asyncio.run(guard(dict(scope), receive, send))
    assert statuses == [400, 429, 429]


def test_websocket_is_closed(folder):
    sent = []

    async def send(message):
        sent.append(message["type"])

    asyncio.run(RequestGuard(Application(), folder)({"type": "websocket", "path": "/"}, None, send))
    assert sent == ["websocket.close"]
