"""The search as a web page: `python app.py --gallery ~/Pictures`, then open http://127.0.0.1:7860."""

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
from webui.page import build_page, gradio

LARGEST_UPLOAD = "20mb"
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Flags:
    """A web page to search photos by sentence and by photo. Only small copies of found photos leave this machine."""

    gallery: tuple[Path, ...] = ()  # folders of photos to search, beside the run's own data set
    run: Path | None = None  # the run to start with; without it the newest finished one
    model: str | None = None  # a pretrained pair (CLIP, SigLIP ...) to start with: a folder or a hub's name
    split: Literal["train", "val", "test"] = "test"  # the part of the run's data set to search in
    index: str | None = None  # as in infer.py: "faiss", "milvus", a file FILE.db, or a cluster's http address
    host: str = "127.0.0.1"  # who may open the page: "0.0.0.0" lets everyone who reaches this machine
    port: int = 7860
    auth: str | None = None  # NAME:PASSWORD that visitors must give
    data_dir: Path | None = None  # where the data set lies now, if it has moved since training
    runs_dir: Path = Path(Config.runs_dir)  # where runs are looked for
    cache_dir: Path | None = None  # where embeddings are kept; without it, where the run keeps its own
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # "auto" takes the GPU if there is one
    precision: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # of the encoders

    def __post_init__(self):
        if self.auth is not None and not all(self.auth.partition(":")[::2]):
            raise ValueError("--auth must be NAME:PASSWORD")
        if self.model is not None and not self.gallery:
            raise ValueError("--model brings no photos: name a folder with --gallery FOLDER")
        if self.index is not None:
            check_index(self.index)
        if not 1 <= self.port <= 65_535:
            raise ValueError(f"--port must be from 1 to 65535, got {self.port}")


class OnlyOwnFiles:
    """Refuses what Gradio would fetch from other machines for a visitor, /file=http..., and hand on."""

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
        # All that Gradio ever serves: what this page uploaded and drew. It goes when the page does.
        os.environ["GRADIO_TEMP_DIR"] = folder
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        page = build_page(catalog, flags.index)
        catalog.warm_up()
        serve(page, flags)


def serve(page, flags: Flags) -> None:
    """Answer until Ctrl-C."""
    if flags.host not in LOCAL_HOSTS and flags.auth is None:
        print("anyone who reaches this machine can search these photos: --auth NAME:PASSWORD asks for a password")
    page.launch(
        theme=gradio().themes.Default(font=["system-ui"], font_mono=["monospace"]),  # no letters from the internet
        server_name=flags.host,
        server_port=flags.port,
        auth=tuple(flags.auth.split(":", 1)) if flags.auth else None,
        max_file_size=LARGEST_UPLOAD,
        prevent_thread_lock=True,
        quiet=True,
        app_kwargs={"middleware": [(OnlyOwnFiles, (), {})]},
        ssr_mode=False,
        run_history=False,
        footer_links=["api"],
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was uploaded is deleted then, too
    print(f"open http://{flags.host}:{flags.port} (Ctrl-C ends it)", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        page.close()


if __name__ == "__main__":
    cli.run(main)
