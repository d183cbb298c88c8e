"""The page of app.py: its tabs, what they ask of the shelf of runs and galleries, and what visitors may send."""

import importlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from pathlib import Path

from data.image_io import load_image, open_image
from runtime.run_dir import read_config, read_metrics
from runtime.text import display_filename
from webui.catalog import Catalog, display_name

MOST_PIXELS = 50_000_000  # of an uploaded photo: 150 MB once it is unpacked
SWEPT = (3600, 3600)  # seconds: every hour, uploads and copies older than an hour are deleted
MOST_MATCHES, MOST_CAPTIONS, THUMBNAIL = 60, 10, 512


def build_page(catalog: Catalog, index: str | None):
    """The page: a tab to search, by an index of index.py if one is named, one captions, labels, the model."""
    gr = gradio()
    with gr.Blocks(title="Photo search", fill_width=True, analytics_enabled=False, delete_cache=SWEPT) as page:
        gr.Markdown("# Photo search")
        with gr.Row():
            run = gr.Dropdown(list(catalog.runs), label="Run", value=next(iter(catalog.runs)))
            gallery = gr.Dropdown(catalog.galleries, label="Photos", value=catalog.galleries[0])
        _search_tab(gr, catalog, run, gallery, index)
        _captions_tab(gr, catalog, run)
        _labels_tab(gr, catalog, run)
        _model_tab(gr, catalog, run, page)
        page.load(catalog.refresh, api_name=False)
    return page


def _search_tab(gr, catalog, run, gallery, index):
    with gr.Tab("Photos"):
        with gr.Row():
            with gr.Column():
                sentence = gr.Textbox(label="A sentence", placeholder="a dog in snow", elem_id="sentence")
                photo = _photo_input(gr, "and, or, a photo", "search-photo")
                count = gr.Slider(1, MOST_MATCHES, value=12, step=1, label="How many")
                button = gr.Button("Search", variant="primary", elem_id="search")
            with gr.Column(scale=3):
                found = gr.Gallery(label="Found", columns=4, height="max-content", format="jpeg", elem_id="found")

        @_public_errors(gr, catalog)
        def search_photos(sentence: str, photo: str | None, run: str, gallery: str, count: int):
            """The photos that fit a sentence, resemble a photo, or both: (photo, score and name), best first."""
            from retrieval.searcher import combine_queries, search_images

            searcher, sentence = catalog.searcher(run), (sentence or "").strip()
            if not sentence and photo is None:
                raise ValueError("write a sentence or choose a photo")
            if sentence and (cut := searcher.describe_truncation(sentence)):
                gr.Warning(cut)
            asked = searcher.embed_images([checked(photo)]) if photo else None
            query = combine_queries(searcher.embed_sentences([sentence]) if sentence else None, asked)
            count = min(int(count), MOST_MATCHES)
            (matches,) = search_images(query, catalog.gallery(run, gallery), count, index)
            return thumbnails(matches)

        inputs = [sentence, photo, run, gallery, count]
        asked = [button.click, sentence.submit]
        gr.on(asked, search_photos, inputs, found, concurrency_id="model", api_name="search_photos")


def _captions_tab(gr, catalog, run):
    with gr.Tab("Captions"), gr.Row():
        with gr.Column():
            photo = _photo_input(gr, "A photo", "captions-photo")
            button = gr.Button("Find captions", variant="primary", elem_id="find-captions")
        found = gr.Dataframe(
            headers=["score", "caption"], label="Captions of the run's data set", scale=3, elem_id="captions"
        )

    @_public_errors(gr, catalog)
    def find_captions(photo: str | None, run: str):
        """The captions of the run's data set that fit a photo: (score, caption), best first."""
        from retrieval.searcher import search_captions

        searcher, captions = catalog.searcher(run), catalog.captions(run)
        query = searcher.embed_images([checked(photo)], target="captions")
        (matches,) = search_captions(query, searcher.embed_captions(captions), captions, MOST_CAPTIONS)
        return [[round(match.score, 3), match.item] for match in matches]

    button.click(find_captions, [photo, run], found, concurrency_id="model", api_name="find_captions")


def _labels_tab(gr, catalog, run):
    with gr.Tab("Labels"), gr.Row():
        with gr.Column():
            photo = _photo_input(gr, "A photo", "labels-photo")
            labels = gr.Textbox(label="Labels, one per line", lines=4, placeholder="a dog\na cat", elem_id="labels")
            button = gr.Button("Choose", variant="primary", elem_id="choose")
        chosen = gr.Label(label="Which fits", num_top_classes=10, scale=2, elem_id="chosen")

    @_public_errors(gr, catalog)
    def choose_label(photo: str | None, labels: str, run: str):
        """Which of the labels (one per line) fits a photo: their probabilities."""
        lines = [line.strip() for line in (labels or "").splitlines() if line.strip()]
        matches = catalog.searcher(run).classify(checked(photo), lines)
        return {match.item: match.score for match in matches}

    button.click(choose_label, [photo, labels, run], chosen, concurrency_id="model", api_name="choose_label")


def _model_tab(gr, catalog, run, page):
    with gr.Tab("Model"):
        metrics = gr.Dataframe(label="Recall and mAP in percent, median ranks, as `python evaluate.py` measured them")
        curves = gr.Image(label="Training", format="png", interactive=False, buttons=["fullscreen"], elem_id="curves")
        settings = gr.JSON(label="Settings", elem_id="settings")

    @_public_errors(gr, catalog)
    def about(run: str):
        """A run's metrics by split, its curves, and its settings."""
        from PIL import Image

        folder = catalog.runs[run]
        if folder is None:
            return {"headers": ["split"], "data": []}, None, {"model": run}
        config = vars(read_config(folder))
        measured = read_metrics(folder)
        names = list(dict.fromkeys(name for values in measured.values() for name in values))
        rows = [
            [split, *(round(values[name], 1) if name in values else "" for name in names)]
            for split, values in measured.items()
        ]
        drawn = Image.open(folder / "curves.png") if (folder / "curves.png").is_file() else None
        shown = {
            name: display_name(value) if isinstance(value, str) else value
            for name, value in config.items()
            if not name.endswith("_dir")
        }
        return {"headers": ["split", *names], "data": rows}, drawn, shown

    gr.on([page.load, run.change], about, run, [metrics, curves, settings], api_name="about")


def _photo_input(gr, label, elem_id):
    photo = gr.Image(label=label, type="filepath", sources=["upload", "clipboard"], height=260, elem_id=elem_id)
    # Gradio would unpack the file here, whatever it is; `checked` looks at it first.
    photo.preprocess = lambda payload: payload and payload.path
    keep = photo.async_move_resource_to_block_cache

    async def keep_upload(path):  # Gradio would fetch an address of any size and keep it
        if path is not None and "://" in str(path):
            raise gr.Error("send the photo itself, not its address", print_exception=False)
        return await keep(path)

    photo.async_move_resource_to_block_cache = keep_upload
    return photo


def _public_errors(gr, catalog) -> Callable:
    """A visitor's mistake becomes a message in the page."""

    def decorate(function):
        @wraps(function)
        def wrapped(*words):
            try:
                return function(*words)
            except KeyError as error:
                raise gr.Error(f"the page does not offer {error}", print_exception=False) from None
            except (ValueError, OSError) as error:
                raise gr.Error(catalog.public_error(error), print_exception=False) from None

        return wrapped

    return decorate


def checked(photo: str | None) -> Path:
    """The path of an uploaded photo; ValueError for none, for what is no photo, and for one too large to unpack."""
    if photo is None:
        raise ValueError("choose a photo")
    try:
        with open_image(photo) as image:
            pixels = image.width * image.height
    except Exception:  # decoders raise what they like
        raise ValueError(f"{Path(photo).name} is not a photo that can be read") from None
    if pixels > MOST_PIXELS:
        raise ValueError(
            f"{Path(photo).name} has {pixels / 1e6:.0f} million pixels; the most is {MOST_PIXELS / 1e6:.0f}"
        )
    return Path(photo)


def thumbnails(matches: list) -> list:
    """A small copy of each photo found, with its score and name; one that is gone by now is left out."""
    with ThreadPoolExecutor() as pool:
        copies = list(pool.map(thumbnail, [match.item for match in matches]))
    pairs = zip(copies, matches, strict=True)
    return [(copy, f"{match.score:.3f}  {display_filename(match.item)}") for copy, match in pairs if copy is not None]


def thumbnail(path: Path):
    """The photo, at most THUMBNAIL pixels wide and high, or None."""
    from PIL import Image

    try:
        image = Image.fromarray(load_image(path, THUMBNAIL))
    except OSError:
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return image


def gradio():
    """The library, or one line that says what to install."""
    try:
        return importlib.import_module("gradio")
    except ModuleNotFoundError:
        raise ValueError("the page needs gradio: pip install gradio") from None
