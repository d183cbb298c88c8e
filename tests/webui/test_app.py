"""The page as a visitor meets it, in a headless Chromium: finds, labels, refuses rubbish, and serves nothing else.

Needs `pip install gradio selenium` and Debian's chromium and chromium-driver; without them these tests are skipped.
"""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import warnings

import pytest
from helpers import ROOT, one_line_error, run_in_process, write_image_folder
from PIL import Image

from retrieval.searcher import Match
from webui.catalog import OWN_PHOTOS, Catalog
from webui.page import MOST_PIXELS, checked, gradio, thumbnails

SENTENCE, FOUND = "a yellow circle left of a red cross", "scene_164.png"
QUICK = ["--image-encoder", "test_resnet", "--image-size", 48, "--captions-per-image", 2]
QUICK += ["--num-workers", 0, "--precision", "float32"]  # accelerate allows a process one precision only
WAIT = 60  # seconds
OFFERED = ("runs/sample", "pictures")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a run that knows the sample set, and a gallery of its pictures among other files."""
    pytest.importorskip("gradio")
    place = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        done = run_in_process("train.py", *QUICK, "--epochs", 9, "--name", "sample")
    assert done.returncode == 0, done.stderr
    (place / "pictures").mkdir()
    for picture in sorted((place / "cache" / "sample" / "Images").iterdir())[150:180]:
        shutil.copy(picture, place / "pictures")
    (place / "pictures" / "secret.txt").write_text("for nobody")
    (place / "rubbish.jpg").write_bytes(b"this is no photo")
    return place


@pytest.fixture(scope="module")
def page(place):
    """The address of the page, which runs as a person starts it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, ROOT / "app.py", "--gallery", "pictures", "--port", port, "--split", "train"]
    process = subprocess.Popen(
        list(map(str, command)), cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        said = ""
        while "open http" not in said:
            line = process.stdout.readline()
            assert line, said
            said += line
        yield f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGINT)
        left, _ = process.communicate(timeout=WAIT)
        assert process.returncode == 0 and "page.py" not in said + left, said + left
    finally:
        process.kill()


@pytest.fixture(scope="module")
def chromium():
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("needs chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1300,1000"):
        options.add_argument(word)
    browser = webdriver.Chrome(options=options, service=Service(driver))
    yield browser
    browser.quit()


@pytest.fixture
def visit(chromium, page):
    """The page freshly loaded, and the few things that a visitor does there."""
    chromium.get(page)
    visit = Visit(chromium)
    visit.element("#sentence textarea, #sentence input")
    return visit


class Visit:
    def __init__(self, browser):
        self.browser = browser

    def elements(self, selector):
        return [e for e in self.browser.find_elements("css selector", selector) if e.is_displayed()]

    def element(self, selector, *, displayed=True):
        return self.until(
            lambda: (self.elements(selector) if displayed else self.browser.find_elements("css selector", selector))[0]
        )

    def until(self, look):
        end = time.monotonic() + WAIT
        while True:
            try:
                if found := look():
                    return found
            except Exception:  # not there yet, or there and gone again
                if time.monotonic() > end:
                    raise
            assert time.monotonic() < end, self.browser.find_element("tag name", "body").text
            time.sleep(0.1)

    def tab(self, name):
        self.until(lambda: [b for b in self.elements("button[role=tab]") if b.text == name])[0].click()

    def upload(self, where, path):
        self.element(f"#{where} input[type=file]", displayed=False).send_keys(str(path))
        if path.suffix == ".png":
            self.element(f"#{where} img")
        else:
            self.until(lambda: not self.elements(f"#{where} .uploading, #{where} [data-testid=upload-progress]"))
            time.sleep(1)

    def names(self):
        """Scores and names of the photos found, in their order."""
        return self.until(lambda: re.findall(r"^(-?\d\.\d{3})\s+(\S+)$", self.element("#found").text, re.MULTILINE))

    def message(self):
        return self.until(lambda: self.element(".toast-body, .toast-wrap").text)


def test_a_sentence_shows_the_right_photo_first(visit):
    visit.element("#sentence textarea, #sentence input").send_keys(SENTENCE)
    visit.element("#search").click()
    names = visit.names()
    assert names[0][1] == FOUND and len(names) == 12
    scores = [float(score) for score, _ in names]
    assert scores == sorted(scores, reverse=True)
    first = visit.element("#found img")
    assert visit.until(lambda: int(first.get_property("naturalWidth"))) == 128


def test_a_photo_finds_itself(visit, place):
    visit.upload("search-photo", place / "pictures" / "scene_157.png")
    visit.element("#search").click()
    assert visit.names()[0][1] == "scene_157.png"


def test_a_photo_finds_captions_of_the_data_set(visit, place):
    visit.tab("Captions")
    visit.upload("captions-photo", place / "pictures" / FOUND)
    visit.element("#find-captions").click()
    visit.until(lambda: "circle" in visit.element("#captions").text)


def test_labels_are_shown_with_their_probabilities(visit, place):
    visit.tab("Labels")
    visit.upload("labels-photo", place / "pictures" / FOUND)
    visit.element("#labels textarea").send_keys("a yellow circle\na green star")
    visit.element("#choose").click()
    assert "%" in visit.until(lambda: "%" in visit.element("#chosen").text and visit.element("#chosen").text)
    assert visit.element("#chosen").text.index("a yellow circle") < visit.element("#chosen").text.index("a green star")


def test_rubbish_is_answered_by_a_message(visit, place):
    visit.upload("search-photo", place / "rubbish.jpg")
    visit.element("#search").click()
    assert "rubbish.jpg is not a photo" in visit.message()


def test_an_empty_question_is_answered_by_a_message(visit):
    visit.element("#search").click()
    assert "write a sentence or choose a photo" in visit.message()


def test_a_sentence_that_is_too_long_is_answered_with_a_warning(visit):
    visit.element("#sentence textarea, #sentence input").send_keys("red circle " * 80)
    visit.element("#search").click()
    assert "the model reads 64" in visit.message() and len(visit.names()) == 12


def test_the_page_about_the_model_shows_its_curves(visit):
    visit.tab("Model")
    visit.until(lambda: int(visit.element("#curves img").get_property("naturalWidth")) > 500)
    assert "test_resnet" in visit.until(lambda: visit.element("#settings").text)


def fetch(address):
    try:
        with urllib.request.urlopen(address, timeout=WAIT) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@pytest.mark.parametrize("prefix", ["/gradio_api/file=", "/file=", "/gradio_api/stream/"])
@pytest.mark.parametrize("quoted", [False, True])
def test_no_file_of_this_machine_is_served(page, place, prefix, quoted):
    config = place / "runs" / "sample" / "config.json"
    targets = ["/etc/passwd", place / "pictures" / "secret.txt", place / "pictures" / FOUND]
    targets += [config, "runs/sample/best.pt"]
    targets += ["http://example.com/x.png", "HTTPS://example.com", page]
    targets += ["../../../../../../etc/passwd", f"{place}/pictures/../pictures/{FOUND}", f"file://{config}"]
    for target in map(str, targets):
        status, body = fetch(page + prefix + (urllib.parse.quote(target, safe="") if quoted else target))
        assert status in (401, 403, 404, 405), (target, status)
        assert body == b"not served" or "://" not in target or "stream" in prefix, target
        assert b"for nobody" not in body and b"root:" not in body and b"PNG" not in body


def ask(page, name, *words):
    """Call the page's API as a program does: the event that ends the call, and its data."""
    data = json.dumps({"data": words}).encode()
    request = urllib.request.Request(f"{page}/gradio_api/call/{name}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=WAIT) as answer:
        number = json.load(answer)["event_id"]
    _, body = fetch(f"{page}/gradio_api/call/{name}/{number}")
    event, _, data = body.decode().strip().rpartition("event: ")[2].partition("\ndata: ")
    return event, data


def test_programs_may_ask_too_and_get_small_copies_only(page):
    event, data = ask(page, "search_photos", SENTENCE, None, "runs/sample", "pictures", 3)
    found = json.loads(data)[0]
    assert event == "complete" and len(found) == 3 and found[0]["caption"].endswith(FOUND)
    assert fetch(found[0]["image"]["url"])[0] == 200
    assert "pictures" not in found[0]["image"]["path"]


@pytest.mark.parametrize(
    "words",
    [
        (SENTENCE, None, "runs/other", "pictures", 3),
        (SENTENCE, None, "runs/sample", "/etc", 3),
        (SENTENCE, {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, "runs/sample", "pictures", 3),
        (SENTENCE, {"path": "pictures/secret.txt", "meta": {"_type": "gradio.FileData"}}, "runs/sample", "pictures", 3),
    ],
)
def test_programs_reach_no_other_run_folder_or_file(page, words):
    event, data = ask(page, "search_photos", *words)
    assert event == "error" and "root:" not in data


def test_an_address_is_not_fetched_for_a_visitor(page):
    photo = {"path": "http://example.com/x.png", "meta": {"_type": "gradio.FileData"}}
    event, data = ask(page, "search_photos", SENTENCE, photo, *OFFERED, 3)
    assert event == "error" and "send the photo itself" in data


def test_a_large_upload_is_refused(page):
    boundary = b"--x\r\nContent-Disposition: form-data; name=files; filename=a.jpg\r\n\r\n"
    body = boundary + bytes(21_000_000) + b"\r\n--x--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    status, _ = fetch(urllib.request.Request(f"{page}/gradio_api/upload", body, headers))
    assert status == 413


def test_the_page_describes_its_api(page):
    status, body = fetch(f"{page}/gradio_api/info")
    has_flag = json.loads(body)["named_endpoints"]
    assert status == 200 and set(has_flag) == {"/search_photos", "/find_captions", "/choose_label", "/about"}


def test_an_upload_is_looked_at_before_it_is_unpacked(tmp_path):
    side = int(MOST_PIXELS**0.5) + 1
    Image.new("1", (side, side)).save(tmp_path / "large.png")
    with pytest.raises(ValueError, match=r"large\.png has 50 million pixels; the most is 50"):
        checked(str(tmp_path / "large.png"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own, of the bomb
        Image.new("1", (14_000, 14_000)).save(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match=r"bomb\.png"):
        checked(str(tmp_path / "bomb.png"))
    (tmp_path / "rubbish.jpg").write_bytes(b"no photo")
    with pytest.raises(ValueError, match=r"rubbish\.jpg is not a photo"):
        checked(str(tmp_path / "rubbish.jpg"))
    with pytest.raises(ValueError, match="choose a photo"):
        checked(None)


def test_without_gradio_the_page_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ValueError, match="pip install gradio"):
        gradio()


def test_thumbnails_are_small_and_those_of_vanished_photos_are_left_out(tmp_path):
    Image.new("RGB", (3000, 1000), "red").save(tmp_path / "wide.jpg")
    found = thumbnails([Match(0.5, tmp_path / "gone.jpg"), Match(0.25, tmp_path / "wide.jpg")])
    ((copy, caption),) = found
    assert copy.width == 512 and caption == "0.250  wide.jpg"


def test_a_shelf_offers_its_runs_and_folders_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_image_folder(tmp_path / "photos", 10)
    (tmp_path / "first").mkdir()
    settings = {"split": "test", "data_dir": None, "options": {}}
    (tmp_path / "other" / "photos").mkdir(parents=True)
    folders = [tmp_path / "photos", tmp_path / "other" / "photos"]
    catalog = Catalog(tmp_path / "first", folders, runs_dir=tmp_path / "runs", **settings)
    assert catalog.runs == {"first": tmp_path / "first"}  # visitors see no way from the machine's root
    assert catalog.galleries == ["photos", "photos (2)", OWN_PHOTOS]
    assert list(catalog.folders.values()) == folders
    with pytest.raises(KeyError):
        catalog.searcher("/etc")
    with pytest.raises(FileNotFoundError, match=r"no runs in .*python train\.py"):
        Catalog(None, [], runs_dir=tmp_path / "runs", **settings)


def test_a_pair_keeps_its_place_beside_a_run_of_its_name_and_messages_hold_no_paths(tmp_path):
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
    ("words", "parts"),
    [
        (["--auth", "me"], ["--auth", "NAME:PASSWORD"]),
        (["--port", 0], ["--port", "0"]),
        (["--model", "clip"], ["--model", "--gallery"]),
        (["--index", "x"], ["--index", "faiss"]),
        (["--gallery", "nowhere", "--run", "."], ["nowhere", "--gallery"]),
        ([], ["no runs in runs/", "python train.py"]),
    ],
)
def test_a_mistake_is_one_line(tmp_path, monkeypatch, words, parts):
    monkeypatch.chdir(tmp_path)
    line = one_line_error(run_in_process("app.py", *words))
    assert all(part in line for part in parts), line
