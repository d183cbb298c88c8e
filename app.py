"""Search photos in a web page: `python app.py --gallery ~/Pictures`, then open http://127.0.0.1:7860."""

import multiprocessing
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from config import Config
from retrieval.searcher import check_index
from runtime import cli
from runtime.text import display_text
from webui import login
from webui.catalog import Catalog
from webui.limits import MAX_UPLOAD, RequestGuard
from webui.page import build_page, import_gradio
from webui.temp_folder import page_folder, start_sweeper

MAX_SESSIONS = 1_000  # visitors whose last inputs Gradio keeps in memory
STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Flags:
    """Serve a web page that searches photos by sentence or photo. Visitors receive only thumbnails of the matches."""

    gallery: tuple[Path, ...] = ()  # folders of photos to search, besides the run's data set
    run: Path | None = None  # the run (a folder, or OWNER/NAME on the hub) to start with; default: the newest finished
    model: str | None = None  # a pretrained model (CLIP, SigLIP ...) to start with: a folder or hub name
    split: Literal["train", "val", "test", "all"] = "test"  # the split of the run's data set to search in
    index: str | None = None  # for large galleries: faiss, milvus, a file FILE.db, or a cluster's http(s) address
    host: str = "127.0.0.1"  # the address to listen on; 0.0.0.0 admits everyone who can reach this machine
    port: int = 7860  # the port to listen on
    auth: str | None = None  # NAME:PASSWORD that visitors must enter; safer: --auth-file, or the variable PAGE_AUTH
    auth_file: Path | None = None  # a file with the line NAME:PASSWORD
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


def main() -> None:
    flags = cli.parse_flags(Flags)
    auth = login.read_auth(flags.auth, flags.auth_file)
    catalog = Catalog(
        flags.run,
        flags.gallery,
        split=flags.split,
        model=flags.model,
        runs_dir=flags.runs_dir,
        data_dir=flags.data_dir,
        options={"device": flags.device, "precision": flags.precision, "cache_dir": flags.cache_dir},
    )
    for name in STOP_SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.default_int_handler)  # so that they delete the uploads, too
    with page_folder() as folder:
        # Gradio serves only files of this folder: uploads and thumbnails. It is deleted when the page is closed.
        os.environ |= {"GRADIO_TEMP_DIR": str(folder), "GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_NUM_WORKERS": "0"}
        page = build_page(catalog, flags.index, folder)
        catalog.warm_up()
        serve(page, flags, auth, folder)
    end_process()


def serve(page, flags: Flags, auth: tuple[str, str] | None, folder: Path) -> None:
    """Serve the page until Ctrl-C, SIGTERM or SIGHUP."""
    if flags.host not in LOCAL_HOSTS and auth is None:
        print("anyone who can reach this machine can search these photos: require a password with --auth-file FILE")
    for line in login.warnings(flags.auth, flags.auth_file):
        print(display_text(line), file=sys.stderr)
    page.launch(
        theme=import_gradio().themes.Default(font=["system-ui"], font_mono=["monospace"]),  # no fonts from the internet
        server_name=flags.host,
        server_port=flags.port,
        auth=login.Password(*auth) if auth else None,
        max_file_size=MAX_UPLOAD,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        app_kwargs={"middleware": [(RequestGuard, (folder,), {})]},
        ssr_mode=False,
        run_history=False,
        footer_links=["api"],
        state_session_capacity=MAX_SESSIONS,
    )
    sweeper = start_sweeper(folder)
    print(f"open http://{flags.host}:{flags.port} (Ctrl-C stops the server)", flush=True)
    try:
        while not sweeper.wait(60):
            pass
    except KeyboardInterrupt:
        sweeper.set()
        page.server.force_exit = True  # clients that keep their connection open are not waited for
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # stderr: a traceback for each request that is cut off
        page.close(verbose=False)


def end_process() -> None:
    """End at once: Python would wait for the threads of searches that still run."""
    for child in multiprocessing.active_children():
        child.terminate()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    cli.run(main)
