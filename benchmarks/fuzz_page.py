"""The page's API for benchmarks/fuzz.py: requests with wrong types, odd JSON, odd forms and odd paths."""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random

from benchmarks.fuzz_mutations import damage, modify

ENDPOINTS = ("unknown", "predict", "../x", "\u72d7")  # besides those of the page
PATHS = ("config", "info", "file=/etc/passwd", "file=../../x", "upload_progress", "queue/data", "proxy=x")
HEADERS = {"content-type": "application/json"}


def page_client(folder: Path, run: Path):
    """Return a client of the page of a run, with the middleware of app.py, and no server."""
    import os

    os.environ |= {"GRADIO_TEMP_DIR": str(folder / "uploads"), "GRADIO_ANALYTICS_ENABLED": "False"}
    from gradio.routes import App
    from starlette.testclient import TestClient

    from webui.catalog import Catalog
    from webui.limits import MAX_UPLOAD, RequestGuard
    from webui.page import build_page

    (folder / "uploads").mkdir()
    options = {"device": "cpu", "precision": "float32", "cache_dir": str(folder / "cache")}
    settings = {"split": "test", "model": None, "runs_dir": str(run.parent), "data_dir": None, "options": options}
    catalog = Catalog(run, [folder / "set"], **settings)
    page = build_page(catalog, None, folder / "uploads")
    page.max_file_size = MAX_UPLOAD  # set by launch()
    app = App.create_app(page, app_kwargs={"middleware": [(RequestGuard, (folder / "uploads",), {})]})
    return TestClient(app, raise_server_exceptions=False), [dict(item) for item in page.config["dependencies"]]


def attempt_requests(client, endpoints: list[str]) -> Callable[[Random], None]:
    """Return a function that sends one request: the answer must not be an unexpected error of the server."""
    file = {"path": "photo.png", "meta": {"_type": "gradio.FileData"}}
    bodies = [
        {"data": ["a dog", None, "run", "photos", 5]},
        {"data": [file, "run", 3], "session_hash": "abc", "fn_index": 0, "trigger_id": 1, "event_data": None},
        {"data": ["a dog\na cat", file, "run"]},
    ]

    def attempt(rng):
        body = rng.choice(bodies)
        for _ in range(rng.randint(1, 3)):
            body = modify(body, rng)
        content = json.dumps(body).encode()
        content = damage(content, rng) if rng.random() < 0.3 else content
        name = rng.choice((*endpoints, *ENDPOINTS))
        kind = rng.randrange(5)
        if kind == 0:
            answer = client.post(f"/gradio_api/call/{name}", content=content, headers=HEADERS)
        elif kind == 1:
            answer = client.post(f"/gradio_api/run/{name}", content=content, headers=HEADERS)
        elif kind == 2:
            answer = client.post("/gradio_api/queue/join", content=content, headers=HEADERS)
        elif kind == 3:
            form = b'--b\r\nContent-Disposition: form-data; name="files"; filename="x.png"\r\n\r\n\x89PNG\r\n--b--\r\n'
            boundary = rng.choice(("b", "c", "b" * 500, ""))
            headers = {"content-type": f"multipart/form-data; boundary={boundary}"}
            answer = client.post("/gradio_api/upload", content=damage(form, rng), headers=headers)
        else:
            answer = client.get(f"/gradio_api/{rng.choice(PATHS)}")
        if answer.status_code >= 500:
            lines = " ".join(answer.text.split())
            if answer.status_code != 500 or "error" not in lines or "Traceback" in lines or "/tmp" in lines:
                raise AssertionError(f"status {answer.status_code} of kind {kind}: {lines[:90]}")

    return attempt
