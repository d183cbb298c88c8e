"""The Gradio page of app.py: its tabs, and their searches in the catalog."""

import importlib
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data.image_io import load_image
from runtime.run_dir import CURVES, read_config, read_metrics
from runtime.text import display_filename, display_text
from webui.catalog import RUN_PHOTOS, Catalog, display_name
from webui.checks import install_checks
from webui.inputs import MAX_MATCHES, VisitorError, check_labels, check_sentence, check_upload, load_picture

MAX_CAPTIONS = 10
THUMBNAIL_SIZE, CURVES_SIZE = 512, 3000  # pixels
MAX_WAITING = 1_000  # searches that wait for the model; further ones are refused


def build_page(catalog: Catalog, index: str | None, folder: Path):
    """Build the page. index: the name of an index (ann_index.py), or None for exact search.

    folder: where Gradio stores uploads.
    """
    gr = import_gradio()
    # What Gradio and Pillow warn about are visitors' inputs: nothing for the terminal.
    warnings.filterwarnings("ignore", module=r"gradio\.helpers|PIL\.")
    with gr.Blocks(title="Photo search", fill_width=True, analytics_enabled=False) as page:
        gr.Markdown("# Photo search")
        with gr.Row():
            run = gr.Dropdown(list(catalog.runs), label="Run", value=next(iter(catalog.runs)))
            gallery = gr.Dropdown(catalog.galleries, label="Photos", value=catalog.galleries[0])
        _search_tab(gr, catalog, run, gallery, index)
        _captions_tab(gr, catalog, run)
        _labels_tab(gr, catalog, run)
        _model_tab(gr, catalog, run, page)
        page.load(catalog.refresh, api_name=False)
    page.queue(max_size=MAX_WAITING)
    install_checks(gr, page, catalog, folder)
    return page


def _search_tab(gr, catalog, run, gallery, index):
    with gr.Tab("Photos"):
        with gr.Row():
            with gr.Column():
                sentence = gr.Textbox(label="A sentence", placeholder="a dog in snow", elem_id="sentence")
                photo = _photo_input(gr, "and/or a photo", "search-photo")
                count = gr.Slider(1, MAX_MATCHES, value=12, step=1, label="How many")
                button = gr.Button("Search", variant="primary", elem_id="search")
            with gr.Column(scale=3):
                found = gr.Gallery(label="Found", columns=4, height="max-content", format="jpeg", elem_id="found")

        def search_photos(sentence: str, photo: str | None, run: str, gallery: str, count: int):
            """Return the photos that match a sentence, a photo, or both: (thumbnail, score and name), best first."""
            from retrieval.searcher import combine_queries, search_images

            searcher, sentence = catalog.searcher(run), check_sentence(sentence)
            if not sentence and photo is None:
                raise VisitorError("write a sentence or choose a photo")
            for warning in searcher.warnings(sentence) if sentence else ():
                gr.Warning(display_text(warning))
            photo_emb = searcher.embed_images([check_upload(photo)]) if photo else None
            query = combine_queries(searcher.embed_sentences([sentence]) if sentence else None, photo_emb)
            (matches,) = search_images(query, catalog.gallery(run, gallery), count, index)
            return make_thumbnails(matches)

        inputs = [sentence, photo, run, gallery, count]
        triggers = [button.click, sentence.submit]
        gr.on(triggers, search_photos, inputs, found, concurrency_id="model", api_name="search_photos")


def _captions_tab(gr, catalog, run):
    with gr.Tab("Captions"), gr.Row():
        with gr.Column():
            photo = _photo_input(gr, "A photo", "captions-photo")
            button = gr.Button("Find captions", variant="primary", elem_id="find-captions")
        found = gr.Dataframe(
            headers=["score", "caption"], label=f"Captions of {RUN_PHOTOS[catalog.split]}", scale=3, elem_id="captions"
        )

    def find_captions(photo: str | None, run: str):
        """Return the captions of the run's data set that match a photo: (score, caption), best first."""
        from retrieval.searcher import search_captions

        searcher, captions = catalog.searcher(run), catalog.captions(run)
        query = searcher.embed_images([check_upload(photo)], target="captions")
        (matches,) = search_captions(query, searcher.embed_captions(captions), captions, MAX_CAPTIONS)
        return [[round(match.score, 3), match.item] for match in matches]

    button.click(find_captions, [photo, run], found, concurrency_id="model", api_name="find_captions")


def _labels_tab(gr, catalog, run):
    with gr.Tab("Labels"), gr.Row():
        with gr.Column():
            photo = _photo_input(gr, "A photo", "labels-photo")
            labels = gr.Textbox(label="Labels, one per line", lines=4, placeholder="a dog\na cat", elem_id="labels")
            button = gr.Button("Choose", variant="primary", elem_id="choose")
        chosen = gr.Label(label="Probabilities", num_top_classes=10, scale=2, elem_id="chosen")

    def choose_label(photo: str | None, labels: str, run: str):
        """Return the probability of each label (one per line) for a photo."""
        matches = catalog.searcher(run).classify(check_upload(photo), check_labels(labels))
        return {match.item: match.score for match in matches}

    button.click(choose_label, [photo, labels, run], chosen, concurrency_id="model", api_name="choose_label")


def _model_tab(gr, catalog, run, page):
    with gr.Tab("Model"):
        metrics = gr.Dataframe(label="Recall and mAP in percent, and median ranks, from `python evaluate.py`")
        curves = gr.Image(label="Curves", format="png", interactive=False, buttons=["fullscreen"], elem_id="curves")
        settings = gr.JSON(label="Settings", elem_id="settings")

    def about(run: str):
        """Return a run's metrics by split, its training curves and its settings."""
        folder = catalog.runs[run]
        if folder is None:
            return {"headers": ["split"], "data": []}, None, {"model": run}
        config = vars(read_config(folder))
        metrics_by_split = read_metrics(folder)
        names = list(dict.fromkeys(name for values in metrics_by_split.values() for name in values))
        rows = [
            [split, *(round(values[name], 1) if name in values else "" for name in names)]
            for split, values in metrics_by_split.items()
        ]
        try:
            curves_image = load_picture(folder / CURVES, CURVES_SIZE) if (folder / CURVES).exists() else None
        except VisitorError as error:
            gr.Warning(str(error))
            curves_image = None
        public_settings = {
            name: display_name(value) if isinstance(value, str) else value
            for name, value in config.items()
            if not name.endswith("_dir")
        }
        return {"headers": ["split", *names], "data": rows}, curves_image, public_settings

    gr.on([page.load, run.change], about, run, [metrics, curves, settings], api_name="about")


def _photo_input(gr, label, elem_id):
    photo = gr.Image(label=label, type="filepath", sources=["upload", "clipboard"], height=260, elem_id=elem_id)
    # Gradio would decode any file here. Pass on the path instead, so that `check_upload` sees the file first.
    photo.preprocess = lambda payload: payload and payload.path
    return photo


def make_thumbnails(matches: list) -> list:
    """Return a thumbnail of each photo found, with its score and name; photos that no longer exist are skipped."""
    with ThreadPoolExecutor() as pool:
        images = list(pool.map(_thumbnail, [match.item for match in matches]))
    return [
        (image, f"{match.score:.3f}  {display_filename(match.item)}")
        for image, match in zip(images, matches, strict=True)
        if image is not None
    ]


def _thumbnail(path: Path):
    """Return the photo, at most THUMBNAIL_SIZE pixels wide and high, or None if it cannot be read."""
    from PIL import Image

    try:
        image = Image.fromarray(load_image(path, THUMBNAIL_SIZE))
    except OSError:
        return None
    image.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
    return image


def import_gradio():
    """Import Gradio. Raises ValueError with the install command if it is missing."""
    try:
        return importlib.import_module("gradio")
    except ModuleNotFoundError:
        raise ValueError("the page needs gradio: pip install gradio") from None
