"""The web page in a headless Chromium: it searches, classifies, rejects invalid uploads, and serves no other files.

Needs `pip install gradio selenium` and Debian's chromium and chromium-driver; otherwise, the browser tests are skipped.
"""

import contextlib
import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import warnings

import pytest
from helpers import ROOT, one_line_error, run_in_process, write_image_folder
from PIL import Image

from retrieval.searcher import Match
from webui.catalog import RUN_PHOTOS, Catalog
from webui.inputs import MAX_PIXELS, check_upload
from webui.page import import_gradio
from webui.search_tab import _caption, _load_thumbnails

SENTENCE, MATCH = "a yellow circle left of a red cross", "scene_164.png"
QUICK = ["--image-encoder", "test_resnet", "--image-size", 48, "--captions-per-image", 2]
QUICK += ["--num-workers", 0, "--precision", "float32"]  # accelerate allows one precision per process
TIMEOUT = 60  # seconds
FORM_HEADER = b"Content-Type: multipart/form-data; boundary=x\r\n\r\n"
RUN_AND_GALLERY = ("runs/sample", "pictures")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a run trained on the sample set, a gallery of its photos, and other files."""
    pytest.importorskip("gradio")
    root = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        done = run_in_process("train.py", *QUICK, "--epochs", 6, "--name", "sample")
    assert done.returncode == 0, done.stderr
    (root / "pictures").mkdir()
    for picture in sorted((root / "cache" / "sample" / "Images").iterdir())[156:186]:
        shutil.copy(picture, root / "pictures")
    (root / "pictures" / "older").mkdir()
    (root / "pictures" / "scene_170.png").rename(root / "pictures" / "older" / "scene_170.png")
    (root / "pictures" / "secret.txt").write_text("confidential")
    (root / "invalid.jpg").write_bytes(b"this is no photo")
    return root


@pytest.fixture(scope="module")
def pages(root):
    """Two pages that share a cache, each served by `python app.py` in a process of its own: the first one is open, the
    second one, which asks for a password, starts while the first one is tested."""
    (root / "auth").write_text("ann:of:green")
    (root / "auth").chmod(0o600)
    with (
        start_page(root, "visitors") as first,
        opened(first) as opened_first,
        start_page(root, "others", "--auth-file", "auth") as second,
    ):
        yield opened_first, second


@pytest.fixture(scope="module")
def page(pages, root):
    """The address of the page without a password. At the end it gets SIGINT while it is busy and clients hang."""
    process, address, lines, reader = pages[0]
    yield address
    port = int(address.rpartition(":")[2])
    hanging = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
    hanging[0].sendall(b"GET /gradio_api/heartbeat/abc HTTP/1.1\r\nHost: x\r\n\r\n")
    hanging[1].sendall(b"POST /gradio_api/upload HTTP/1.1\r\nHost: x\r\nContent-Length: 900\r\n" + FORM_HEADER)
    path = upload(address, (root / "pictures" / MATCH).read_bytes())
    labels = "\n".join(f"a red {number}" for number in range(1_000))
    for _ in range(8):
        post(f"{address}/gradio_api/call/choose_label", {"data": [{"path": path}, labels, "runs/sample"]})
    end_page(process, signal.SIGINT)
    reader.join(TIMEOUT)
    assert not list((root / "visitors").iterdir())  # the temporary folder is deleted
    output = "".join(lines)
    assert "Traceback" not in output and "search-page" not in output and str(root) not in output, output
    assert max(map(len, lines)) < 600 and len(lines) < 60, output


@contextlib.contextmanager
def start_page(root, temporary, *arguments):
    """Start `python app.py`; yields the process and its address."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    command = [sys.executable, ROOT / "app.py", "--gallery", "pictures", "--port", port, "--split", "train", *arguments]
    (root / temporary).mkdir()
    environment = os.environ | {"TMPDIR": str(root / temporary)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(list(map(str, command)), cwd=root, env=environment, text=True, **pipes)
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def opened(started):
    """Wait until a page is open; yields the process, its address, the lines that it prints, and their reader."""
    process, address = started
    lines = []
    while not lines or "open http" not in lines[-1]:
        lines.append(process.stdout.readline())
        assert lines[-1], lines
    reader = threading.Thread(target=lambda: lines.extend(process.stdout), daemon=True)
    reader.start()
    yield process, address, lines, reader
    reader.join(TIMEOUT)


def end_page(process, number):
    start = time.monotonic()
    process.send_signal(number)
    assert process.wait(TIMEOUT) == 0
    assert time.monotonic() - start < 10


@pytest.fixture(scope="module")
def chromium():
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("needs chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1300,1000"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options=options, service=Service(driver))
    yield browser
    browser.quit()


@pytest.fixture
def visit(chromium, page):
    """The page, loaded anew in the browser."""
    chromium.get(page)
    visit = Visit(chromium)
    visit.element("#sentence textarea, #sentence input")
    return visit


class Visit:
    """A visitor's actions in the page."""

    def __init__(self, browser):
        self.browser = browser

    def elements(self, selector):
        return [element for element in self.browser.find_elements("css selector", selector) if element.is_displayed()]

    def element(self, selector, *, displayed=True):
        return self.until(
            lambda: (self.elements(selector) if displayed else self.browser.find_elements("css selector", selector))[0]
        )

    def until(self, condition):
        """Return the value of `condition` as soon as it is true."""
        deadline = time.monotonic() + TIMEOUT
        while True:
            try:
                if value := condition():
                    return value
            except Exception:  # the element does not exist yet, or Gradio has replaced it
                if time.monotonic() > deadline:
                    raise
            assert time.monotonic() < deadline, self.browser.find_element("tag name", "body").text
            time.sleep(0.1)

    def tab(self, name):
        self.until(lambda: [tab for tab in self.elements("button[role=tab]") if tab.text == name])[0].click()

    def upload(self, elem_id, path):
        self.element(f"#{elem_id} input[type=file]", displayed=False).send_keys(str(path))
        if path.suffix == ".png":
            self.element(f"#{elem_id} img")

    def matches(self):
        """Return the scores and names of the photos found, in their order."""
        return self.until(lambda: re.findall(r"^(-?\d\.\d{3})\s+(\S+)$", self.element("#found").text, re.MULTILINE))

    def search(self, sentence):
        """Search for a sentence; returns the scores and names of the photos found."""
        box = self.element("#sentence textarea, #sentence input")
        box.clear()
        box.send_keys(sentence)
        self.element("#search").click()
        return self.matches()

    def message(self):
        return self.until(lambda: self.element(".toast-body, .toast-wrap").text)


def test_sentence_finds_the_matching_photo_first(visit):
    visit.element("#sentence textarea, #sentence input").send_keys(SENTENCE)
    visit.element("#search").click()
    matches = visit.matches()
    assert matches[0][1] == MATCH and len(matches) == 12
    scores = [float(score) for score, _ in matches]
    assert scores == sorted(scores, reverse=True)
    first = visit.element("#found img")
    assert visit.until(lambda: int(first.get_property("naturalWidth"))) == 128


def test_photo_finds_itself(visit, root):
    visit.upload("search-photo", root / "pictures" / "scene_157.png")
    visit.element("#search").click()
    assert visit.matches()[0][1] == "scene_157.png"


def test_photo_finds_captions_of_the_data_set(visit, root):
    visit.tab("Captions")
    visit.upload("captions-photo", root / "pictures" / MATCH)
    visit.element("#find-captions").click()
    visit.until(lambda: "circle" in visit.element("#captions").text)


def test_labels_are_shown_with_their_probabilities(visit, root):
    visit.tab("Labels")
    visit.upload("labels-photo", root / "pictures" / MATCH)
    visit.element("#labels textarea").send_keys("a yellow circle\na green star")
    visit.element("#choose").click()
    assert "%" in visit.until(lambda: "%" in visit.element("#chosen").text and visit.element("#chosen").text)
    assert visit.element("#chosen").text.index("a yellow circle") < visit.element("#chosen").text.index("a green star")


def test_invalid_upload_is_refused_when_it_arrives(visit, root):
    visit.upload("search-photo", root / "invalid.jpg")
    assert "invalid.jpg is not a photo" in visit.message()
    visit.element("#search-photo input[type=file]", displayed=False)  # the next photo can be chosen


def test_empty_query_shows_an_error_message(visit):
    visit.element("#search").click()
    assert "write a sentence or choose a photo" in visit.message()


def test_truncated_sentence_shows_a_warning_and_its_matches(visit):
    visit.element("#sentence textarea, #sentence input").send_keys("red circle " * 80)
    visit.element("#search").click()
    assert "the model reads 64" in visit.message() and len(visit.matches()) == 12


def test_model_tab_shows_training_curves_and_settings(visit):
    visit.tab("Model")
    visit.until(lambda: int(visit.element("#curves img").get_property("naturalWidth")) > 500)
    assert "test_resnet" in visit.until(lambda: visit.element("#settings").text)
    words = visit.element("#about").text
    assert "R@1" in words and "of 100 sentences" in words and "python evaluate.py runs/sample --split test" in words


def test_photo_that_was_clicked_has_its_folder_original_and_similar_photos(visit, page):
    visit.search(SENTENCE)
    photos = len(visit.elements("#found .thumbnail-lg"))
    assert "best 12 of 30 photos searched" in visit.element("#searched").text
    visit.elements("#found .thumbnail-lg")[1].click()
    details = visit.until(lambda: visit.element("#details").text)
    name = details.split()[0]
    assert name.startswith("scene_") and "pictures" in details
    assert not visit.browser.find_elements("css selector", "[aria-label*=hare], [title*=hare]")  # no Share button
    original = visit.element("#details a").get_attribute("href")
    assert original.startswith(f"{page}/original?") and fetch(original)[1][1:4] == b"PNG"
    visit.element("#more-like-this").click()
    visit.until(lambda: f"photos like {name} of 30" in visit.element("#searched").text)
    matches = visit.matches()
    assert len(matches) == photos and name not in [match for _, match in matches]
    visit.until(lambda: len(visit.elements("#found .thumbnail-lg")) == photos and not visit.elements("#details"))


def test_next_search_leaves_the_view_of_a_single_photo(visit):
    visit.search(SENTENCE)
    visit.elements("#found .thumbnail-lg")[2].click()
    visit.element("#found .preview")
    visit.search("a green star")
    visit.until(lambda: len(visit.elements("#found .thumbnail-lg")) == 12)
    assert not visit.elements("#found .preview") and not visit.elements("#more-like-this")


def test_three_captions_are_examples_that_search(visit):
    examples = visit.until(lambda: len(found := visit.elements("#examples button")) == 3 and found)
    text = examples[1].text
    examples[1].click()
    assert len(visit.matches()) == 12
    assert visit.element("#sentence textarea, #sentence input").get_attribute("value") == text


def test_phone_shows_two_columns_and_folds_the_upload_away(chromium, page):
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        chromium.get(page)
        visit = Visit(chromium)
        visit.search(SENTENCE)
        boxes = [photo.rect for photo in visit.elements("#found .thumbnail-lg")]
        assert len({round(box["x"]) for box in boxes}) == 2 and max(box["x"] + box["width"] for box in boxes) <= 390
        assert min(box["y"] for box in boxes) < 500
        assert not visit.elements("#search-photo, #count")
        assert chromium.execute_script("return document.documentElement.scrollWidth") <= 390
        visit.element("#more button").click()
        visit.element("#search-photo")
    finally:
        chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def fetch(address):
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@pytest.mark.parametrize("prefix", ["/gradio_api/file=", "/file=", "/gradio_api/stream/"])
@pytest.mark.parametrize("quoted", [False, True])
def test_no_other_file_of_the_machine_is_served(page, root, prefix, quoted):
    config = root / "runs" / "sample" / "config.json"
    targets = ["/etc/passwd", root / "pictures" / "secret.txt", root / "pictures" / MATCH]
    targets += [config, "runs/sample/best.pt"]
    targets += ["http://example.com/x.png", "HTTPS://example.com", page]
    targets += ["../../../../../../etc/passwd", f"{root}/pictures/../pictures/{MATCH}", f"file://{config}"]
    for target in map(str, targets):
        status, body = fetch(page + prefix + (urllib.parse.quote(target, safe="") if quoted else target))
        assert status in (401, 403, 404, 405), (target, status)
        assert body == b"not served" or "://" not in target or "stream" in prefix, target
        assert b"confidential" not in body and b"root:" not in body and b"PNG" not in body


def post(address, value, content_type="application/json"):
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return fetch(urllib.request.Request(address, data, {"Content-Type": content_type}))


def upload(page, content):
    """Upload a file; return its path on the page."""
    form = b"--x\r\nContent-Disposition: form-data; name=files; filename=a.png\r\n\r\n" + content + b"\r\n--x--\r\n"
    status, body = post(f"{page}/gradio_api/upload", form, "multipart/form-data; boundary=x")
    assert status == 200, body
    return json.loads(body)[0]


def call_api(page, name, *args):
    """Call an endpoint of the page's API; return the last event and its data."""
    status, body = post(f"{page}/gradio_api/call/{name}", {"data": args})
    if status != 200:
        return "error", body.decode()
    event_id = json.loads(body)["event_id"]
    _, body = fetch(f"{page}/gradio_api/call/{name}/{event_id}")
    event, _, data = body.decode().strip().rpartition("event: ")[2].partition("\ndata: ")
    return event, data


def test_api_returns_matches_with_thumbnails_instead_of_files(page):
    event, data = call_api(page, "search_photos", SENTENCE, None, *RUN_AND_GALLERY, 3)
    matches = json.loads(data)[0]
    assert event == "complete" and len(matches) == 3 and matches[0]["caption"].endswith(f"{MATCH}\npictures")
    assert fetch(matches[0]["image"]["url"])[0] == 200
    assert "pictures" not in matches[0]["image"]["path"]


@pytest.mark.parametrize(
    "args",
    [
        (SENTENCE, None, "runs/other", "pictures", 3),
        (SENTENCE, None, "runs/sample", "/etc", 3),
        (SENTENCE, {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, "runs/sample", "pictures", 3),
        (SENTENCE, {"path": "pictures/secret.txt", "meta": {"_type": "gradio.FileData"}}, "runs/sample", "pictures", 3),
    ],
)
def test_api_gives_no_access_to_other_runs_folders_or_files(page, args):
    event, data = call_api(page, "search_photos", *args)
    assert event == "error" and "root:" not in data


def test_remote_address_is_not_downloaded(page):
    photo = {"path": "http://example.com/x.png", "meta": {"_type": "gradio.FileData"}}
    event, data = call_api(page, "search_photos", SENTENCE, photo, *RUN_AND_GALLERY, 3)
    assert event == "error" and "upload the photo itself" in data


def test_photo_and_all_but_the_sentence_are_optional_in_the_api(page):
    _, body = fetch(f"{page}/gradio_api/info")
    parameters = json.loads(body)["named_endpoints"]["/search_photos"]["parameters"]
    assert [item["parameter_name"] for item in parameters] == ["sentence", "photo", "run", "gallery", "count"]
    assert all(item["parameter_has_default"] for item in parameters)
    _, body = post(f"{page}/gradio_api/call/v2/search_photos", {"sentence": SENTENCE, "count": 2})
    _, body = fetch(f"{page}/gradio_api/call/search_photos/{json.loads(body)['event_id']}")
    assert b"event: complete" in body and body.count(b'"caption"') == 2 and b"The best 2 of 30 photos" in body


def test_original_is_for_this_machine_and_for_photos_of_opened_galleries(page, root):
    call_api(page, "search_photos", SENTENCE, None, *RUN_AND_GALLERY, 3)

    def original(name, headers=None, photos="pictures", run="runs/sample"):
        query = urllib.parse.urlencode({"run": run, "photos": photos, "name": name})
        return fetch(urllib.request.Request(f"{page}/original?{query}", headers=headers or {}))

    assert original(MATCH) == (200, (root / "pictures" / MATCH).read_bytes())
    assert original("older/scene_170.png")[0] == 200
    for headers in ({"X-Forwarded-For": "192.0.2.7"}, {"Host": "photos.example.com"}, {"Referer": "http://a.example/"}):
        assert original(MATCH, headers) == (404, b"not served")
    names = [
        "secret.txt",
        "../invalid.jpg",
        f"./{MATCH}",
        f"{root}/pictures/{MATCH}",
        f"older/../{MATCH}",
        "",
        "/etc/passwd",
    ]
    assert {original(name)[0] for name in names} == {404}
    assert original(MATCH, photos=RUN_PHOTOS["train"])[0] == original(MATCH, run="runs/other")[0] == 404


def test_upload_above_20_mb_is_refused(page):
    boundary = b"--x\r\nContent-Disposition: form-data; name=files; filename=a.jpg\r\n\r\n"
    body = boundary + bytes(21_000_000) + b"\r\n--x--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    status, _ = fetch(urllib.request.Request(f"{page}/gradio_api/upload", body, headers))
    assert status == 413


@pytest.fixture(scope="module")
def elsewhere():
    """A web server that counts its requests: its address and their paths."""
    paths = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            paths.append(self.path)
            self.send_response(200)
            self.end_headers()

        do_HEAD = do_POST = do_GET

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/x.png", paths
        server.shutdown()


GOOD = {
    "search_photos": [SENTENCE, None, *RUN_AND_GALLERY, 3],
    "find_captions": [None, "runs/sample"],
    "choose_label": [None, "a\nb", "runs/sample"],
    "about": ["runs/sample"],
}


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("route", ["call", "run", "queue"])
def test_no_value_of_any_endpoint_is_fetched_opened_or_waited_for(page, root, elsewhere, name, route):
    address, paths = elsewhere
    private = str(root / "pictures" / MATCH)
    files = [{"path": address}, {"path": address, "meta": {"_type": "gradio.FileData"}}, {"url": address}]
    files += [{"path": private}, {"path": "/dev/ptmx"}, {"path": f"file://{private}"}, [{"path": private}]]
    others = [{"__type__": "update", "value": address}, "y" * 100_000, "z\n" * 9_000, 10**400, -1, "half \ud800"]
    position = {"search_photos": 0, "find_captions": 0, "choose_label": 1, "about": 0}[name]
    config = json.loads(fetch(f"{page}/config")[1])
    function = next(item["id"] for item in config["dependencies"] if item["api_name"] == name)
    for index in range(len(GOOD[name])):
        for value in files + (others if index == position else []):
            data = [*GOOD[name][:index], value, *GOOD[name][index + 1 :]]
            start = time.monotonic()
            if route == "call":
                event, answer = call_api(page, name, *data)
                assert event == "error" and "FileData" not in answer
            elif route == "run":
                status, answer = post(f"{page}/gradio_api/run/{name}", {"data": data})
                assert status in (400, 500) and b"Traceback" not in answer
            else:
                body = {"data": data, "fn_index": function, "session_hash": f"s{index}"}
                status, answer = post(f"{page}/gradio_api/queue/join", body)
                assert status == (400 if value in files else 200) or name == "about", answer
            assert time.monotonic() - start < 10, value
            assert str(root) not in str(answer) or private in str(value)
    assert not paths


def test_mistakes_of_many_kinds_are_answered_in_one_line(page):
    for name, args, message in [
        ("search_photos", ("y" * 2_001, None, *RUN_AND_GALLERY, 3), "2,001 characters"),
        ("search_photos", (SENTENCE, None, *RUN_AND_GALLERY, 61), "from 1 to 60"),
        ("choose_label", (None, "q\n" * 1_001, "runs/sample"), "1,001 labels"),
        ("choose_label", (None, "a\nb", "runs/sample"), "choose a photo"),
        ("about", ("runs/none",), "no such run"),
    ]:
        event, answer = call_api(page, name, *args)
        assert event == "error" and message in answer, answer


def test_uploaded_photo_is_searched_by_its_path_and_many_labels_take_seconds(page, root):
    photo = {"path": upload(page, (root / "pictures" / MATCH).read_bytes()), "url": "http://192.0.2.1/x"}
    event, data = call_api(page, "search_photos", "", photo, *RUN_AND_GALLERY, 1)
    assert event == "complete" and json.loads(data)[0][0]["caption"].endswith(f"{MATCH}\npictures")
    start = time.monotonic()
    labels = "\n".join(f"a blue {number}" for number in range(1_000))
    assert call_api(page, "choose_label", photo, labels, "runs/sample")[0] == "complete"
    assert time.monotonic() - start < 10


def test_second_page_with_a_password_shares_the_cache_and_ends_at_sigterm(page, pages, root):
    with opened(pages[1]) as (process, second, lines, _):
        matches = json.loads(call_api(page, "search_photos", SENTENCE, None, *RUN_AND_GALLERY, 3)[1])[0]
        assert call_api(second, "search_photos", SENTENCE, None, *RUN_AND_GALLERY, 3)[0] == "error"
        original = f"{second}/original?" + urllib.parse.urlencode(
            {"run": RUN_AND_GALLERY[0], "photos": RUN_AND_GALLERY[1], "name": MATCH}
        )
        assert fetch(original)[0] == 403
        form, statuses = "application/x-www-form-urlencoded", []
        cookies = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        for password in (b"wrong", b"of", b"of:green"):
            request = urllib.request.Request(f"{second}/login", b"username=ann&password=" + password)
            request.add_header("Content-Type", form)
            try:
                statuses.append(cookies.open(request, timeout=TIMEOUT).status)
            except urllib.error.HTTPError as error:
                statuses.append(error.code)
        assert statuses == [400, 400, 200]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(urllib.request, "urlopen", cookies.open)
            found = json.loads(call_api(second, "search_photos", SENTENCE, None, *RUN_AND_GALLERY, 3)[1])[0]
            assert fetch(original)[0] == 200
        assert [item["caption"] for item in found] == [item["caption"] for item in matches]
        end_page(process, signal.SIGTERM)
    assert "Traceback" not in "".join(lines) and not list((root / "others").iterdir())


def test_api_documents_its_four_endpoints(page):
    status, body = fetch(f"{page}/gradio_api/info")
    endpoints = json.loads(body)["named_endpoints"]
    assert status == 200 and set(endpoints) == {"/search_photos", "/find_captions", "/choose_label", "/about"}


def test_upload_is_checked_before_it_is_decoded(tmp_path):
    side = int(MAX_PIXELS**0.5) + 1
    Image.new("1", (side, side)).save(tmp_path / "large.png")
    with pytest.raises(ValueError, match=r"large\.png has 50 million pixels; the maximum is 50"):
        check_upload(str(tmp_path / "large.png"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about decompression bombs
        Image.new("1", (14_000, 14_000)).save(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match=r"bomb\.png"):
        check_upload(str(tmp_path / "bomb.png"))
    (tmp_path / "invalid.jpg").write_bytes(b"no photo")
    with pytest.raises(ValueError, match=r"invalid\.jpg is not a photo"):
        check_upload(str(tmp_path / "invalid.jpg"))
    with pytest.raises(ValueError, match="choose a photo"):
        check_upload(None)


def test_missing_gradio_is_an_error_with_the_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ValueError, match="pip install gradio"):
        import_gradio()


def test_thumbnails_are_small_and_skip_deleted_photos(tmp_path):
    Image.new("RGB", (3000, 1000), "red").save(tmp_path / "wide.jpg")
    thumbnails = _load_thumbnails([Match(0.5, tmp_path / "deleted.jpg"), Match(0.25, tmp_path / "wide.jpg")])
    ((match, image),) = thumbnails
    assert image.width == 512 and _caption(match) == "0.250  wide.jpg"


def test_catalog_contains_its_runs_and_folders_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_image_folder(tmp_path / "photos", 10)
    (tmp_path / "first").mkdir()
    settings = {"split": "test", "data_dir": None, "options": {}}
    (tmp_path / "other" / "photos").mkdir(parents=True)
    folders = [tmp_path / "photos", tmp_path / "other" / "photos"]
    catalog = Catalog(tmp_path / "first", folders, runs_dir=tmp_path / "runs", **settings)
    assert catalog.runs == {"first": tmp_path / "first"}  # visitors see no absolute path
    assert catalog.galleries == ["photos", "photos (2)", RUN_PHOTOS["test"]]
    assert list(catalog.folders.values()) == folders
    with pytest.raises(KeyError):
        catalog.searcher("/etc")
    with pytest.raises(FileNotFoundError, match=r"no runs in .*python train\.py"):
        Catalog(None, [], runs_dir=tmp_path / "runs", **settings)


def test_model_precedes_a_run_of_the_same_name_and_messages_contain_no_paths(tmp_path):
    (tmp_path / "runs" / "clip").mkdir(parents=True)
    settings = {"split": "test", "data_dir": None, "options": {}, "runs_dir": tmp_path / "none"}
    (tmp_path / "Pictures").mkdir()
    catalog = Catalog(tmp_path / "runs" / "clip", [tmp_path / "Pictures"], model="/srv/models/clip", **settings)
    assert catalog.runs == {"clip": None, "clip (2)": tmp_path / "runs" / "clip"}
    assert (
        catalog.public_error(f"no photos in {tmp_path}/Pictures:\nlooked for .jpg")
        == "no photos in Pictures: looked for .jpg"
    )


@pytest.mark.parametrize(
    ("arguments", "substrings"),
    [
        (["--auth", "me"], ["--auth", "NAME:PASSWORD"]),
        (["--auth-file", "none.txt"], ["none.txt", "--auth-file"]),
        (["--port", 0], ["--port", "0"]),
        (["--model", "clip"], ["--model", "--gallery"]),
        (["--index", "x"], ["--index", "faiss"]),
        (["--gallery", "nowhere", "--run", "."], ["nowhere", "--gallery"]),
        ([], ["no runs in runs/", "python train.py"]),
    ],
)
def test_wrong_arguments_are_a_one_line_error(tmp_path, monkeypatch, arguments, substrings):
    monkeypatch.chdir(tmp_path)
    line = one_line_error(run_in_process("app.py", *arguments))
    assert all(substring in line for substring in substrings), line
