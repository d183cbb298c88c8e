"""Search photos in a web page: `python app.py --gallery ~/Pictures`, then open http://127.0.0.1:7860."""

import multiprocessing
import os
import signal
import sys
import threading
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from config import Config
from retrieval.search_flags import check_index
from runtime import cli
from runtime.text import display_text
from webui import login
from webui.catalog import Catalog
from webui.limits import MAX_UPLOAD, RequestGuard
from webui.originals import Originals, may_have_originals
from webui.page import STYLE, build_page, import_gradio, theme
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
    index: str | None = (
        None  # for large galleries: faiss, int8, binary, milvus, a file FILE.db, or a server's http(s) address
    )
    host: str = "127.0.0.1"  # the address to listen on; 0.0.0.0 admits everyone who can reach this machine
    port: int = 7860  # the port to listen on
    auth: str | None = None  # NAME:PASSWORD that visitors must enter; safer: --auth-file, or the variable PAGE_AUTH
    auth_file: Path | None = None  # a file with the line NAME:PASSWORD
    originals: bool = False  # give all visitors the photos in full size; default: only those on this machine
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
        allowed = partial(may_have_originals, local=flags.host in LOCAL_HOSTS, everyone=flags.originals)
        page = build_page(catalog, flags.index, folder, may_have_originals=allowed)
        catalog.warm_up()
        middleware = [(RequestGuard, (folder,), {}), (Originals, (catalog, allowed), {})]
        error = serve(page, flags, auth, folder, catalog, middleware)
    end_process(error)


def serve(page, flags: Flags, auth, folder: Path, catalog: Catalog, middleware: list) -> Exception | None:
    """Serve the page until Ctrl-C, SIGTERM or SIGHUP, and encode the first gallery meanwhile.

    Returns the error of the encoding, which ends the page, or None.
    """
    if flags.host not in LOCAL_HOSTS and auth is None:
        photos = "get these photos in full size" if flags.originals else "search these photos"
        print(f"anyone who can reach this machine can {photos}: require a password with --auth-file FILE")
    for line in login.warnings(flags.auth, flags.auth_file):
        print(display_text(line), file=sys.stderr)
    page.launch(
        css_paths=STYLE,
        theme=theme(import_gradio()),
        server_name=flags.host,
        server_port=flags.port,
        auth=login.Password(*auth) if auth else None,
        max_file_size=MAX_UPLOAD,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        app_kwargs={"middleware": middleware},
        ssr_mode=False,
        run_history=False,
        footer_links=["api"],
        state_session_capacity=MAX_SESSIONS,
    )
    sweeper = start_sweeper(folder)
    print(f"open http://{flags.host}:{flags.port} (Ctrl-C stops the server)", flush=True)
    errors, failed = [], threading.Event()
    threading.Thread(target=encode_first, args=(catalog, errors, failed), name="encoder", daemon=True).start()
    try:
        while not failed.wait(60):
            pass
    except KeyboardInterrupt:
        done, total = catalog.encoding.counts()
        if total:
            print(f"{done:,} of {total:,} photos encoded and saved; run the same command again to continue")
    for error in errors:
        print(f"error: {display_text(' '.join(str(error).split()))}", file=sys.stderr, flush=True)
    sweeper.set()
    page.server.force_exit = True  # clients that keep their connection open are not waited for
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # stderr: a traceback for each request that is cut off
    page.close(verbose=False)
    return errors[0] if errors else None


def encode_first(catalog: Catalog, errors: list, failed: threading.Event) -> None:
    """Read the example queries and open the first gallery; an error is appended to `errors`, and the event is set."""
    try:
        catalog.examples(catalog.first[0])
        catalog.gallery(*catalog.first)
    except Exception as error:
        errors.append(error)
        failed.set()


def end_process(error: Exception | None) -> None:
    """End at once, with code 2 after an error: Python would wait for the threads of searches that still run."""
    for child in multiprocessing.active_children():
        child.terminate()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if error is None else 2)


if __name__ == "__main__":
    cli.run(main)
