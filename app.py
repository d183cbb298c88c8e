"""Search photos in a web page: `python app.py --gallery ~/Pictures`, then open http://127.0.0.1:7860."""

import os
import re
import signal
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from config import Config
from retrieval.searcher import check_index
from runtime import cli
from webui.catalog import Catalog
from webui.page import build_page, import_gradio

MAX_UPLOAD = "20mb"
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Flags:
    """Serve a web page that searches photos by sentence or photo. Visitors receive only thumbnails of the matches."""

    gallery: tuple[Path, ...] = ()  # folders of photos to search, besides the run's data set
    run: Path | None = None  # the run's folder to start with; default: the newest finished run
    model: str | None = None  # a pretrained model (CLIP, SigLIP ...) to start with: a folder or hub name
    split: Literal["train", "val", "test"] = "test"  # the split of the run's data set to search in
    index: str | None = None  # for large galleries: faiss, milvus, a file FILE.db, or a cluster's http(s) address
    host: str = "127.0.0.1"  # the address to listen on; 0.0.0.0 admits everyone who can reach this machine
    port: int = 7860  # the port to listen on
    auth: str | None = None  # NAME:PASSWORD that visitors must enter
    data_dir: Path | None = None  # where the data set is stored, if it has moved since training
    runs_dir: Path = Path(Config.runs_dir)  # the folder that contains the runs
    cache_dir: Path | None = None  # where embeddings are cached; default: the run's cache
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto uses the GPU if there is one
    precision: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # precision of the encoders

    def __post_init__(self):
        if self.auth is not None and not all(self.auth.partition(":")[::2]):
            raise ValueError("--auth must be NAME:PASSWORD")
        if self.model is not None and not self.gallery:
            raise ValueError("--model has no data set: give a folder of photos with --gallery FOLDER")
        if self.index is not None:
            check_index(self.index)
        if not 1 <= self.port <= 65_535:
            raise ValueError(f"--port must be from 1 to 65535, got {self.port}")


class BlockRemoteFiles:
    """Answer requests for /file=http... with 403: Gradio would download the address and serve its content."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http" and re.search(r"file=\s*\w+:", scope["path"]):
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b"not served"})
        else:
            await self.app(scope, receive, send)


def main() -> None:
    flags = cli.parse_flags(Flags)
    catalog = Catalog(
        flags.run,
        flags.gallery,
        split=flags.split,
        model=flags.model,
        runs_dir=flags.runs_dir,
        data_dir=flags.data_dir,
        options={"device": flags.device, "precision": flags.precision, "cache_dir": flags.cache_dir},
    )
    with tempfile.TemporaryDirectory(prefix="search-page-") as folder:
        # Gradio serves only files of this folder: uploads and thumbnails. It is deleted when the page is closed.
        os.environ["GRADIO_TEMP_DIR"] = folder
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        page = build_page(catalog, flags.index)
        catalog.warm_up()
        serve(page, flags)


def serve(page, flags: Flags) -> None:
    """Serve the page until Ctrl-C or SIGTERM."""
    if flags.host not in LOCAL_HOSTS and flags.auth is None:
        print("anyone who can reach this machine can search these photos: require a password with --auth NAME:PASSWORD")
    page.launch(
        theme=import_gradio().themes.Default(font=["system-ui"], font_mono=["monospace"]),  # no fonts from the internet
        server_name=flags.host,
        server_port=flags.port,
        auth=tuple(flags.auth.split(":", 1)) if flags.auth else None,
        max_file_size=MAX_UPLOAD,
        prevent_thread_lock=True,
        quiet=True,
        app_kwargs={"middleware": [(BlockRemoteFiles, (), {})]},
        ssr_mode=False,
        run_history=False,
        footer_links=["api"],
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # deletes the uploads, too
    print(f"open http://{flags.host}:{flags.port} (Ctrl-C stops the server)", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        page.close()


if __name__ == "__main__":
    cli.run(main)
