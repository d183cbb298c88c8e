"""The Gradio page of app.py: its tabs, and their searches in the catalog."""

import importlib
import warnings
from collections.abc import Callable
from html import escape
from pathlib import Path

from webui.catalog import RUN_PHOTOS, Catalog
from webui.checks import install_checks
from webui.inputs import check_labels, check_upload
from webui.model_tab import model_tab
from webui.search_tab import photo_input, search_tab

MAX_CAPTIONS = 10
MAX_WAITING = 1_000  # searches that wait for the model; further ones are refused
STYLE, SCRIPT = (Path(__file__).with_name(name) for name in ("page.css", "page.js"))
POLL = 2  # seconds between two looks at the encoding of a gallery


def build_page(catalog: Catalog, index: str | None, folder: Path, *, may_have_originals: Callable | None = None):
    """Build the page. index: the name of an index (ann_index.py), or None for exact search.

    folder: where Gradio stores uploads. may_have_originals: takes the headers and the address of a request, and returns
    whether the photos found are linked to their originals (webui/originals.py); default: they never are.
    """
    gr = import_gradio()
    # What Gradio and Pillow warn about are visitors' inputs: nothing for the terminal.
    warnings.filterwarnings("ignore", module=r"gradio\.helpers|PIL\.")
    with gr.Blocks(title="Photo search", fill_width=True, analytics_enabled=False) as page:
        gr.Markdown("# Photo search", elem_id="title")
        bar = gr.HTML(visible=False, elem_id="encoding", padding=False)
        with gr.Row(elem_id="choice"):
            run = gr.Dropdown(list(catalog.runs), label="Run", value=next(iter(catalog.runs)))
            gallery = gr.Dropdown(catalog.galleries, label="Photos", value=catalog.galleries[0])
        links = may_have_originals or (lambda headers, address: False)
        search_tab(gr, catalog, page, run, gallery, index=index, may_have_originals=links)
        _captions_tab(gr, catalog, run)
        _labels_tab(gr, catalog, run)
        model_tab(gr, catalog, run, page)
        page.load(catalog.refresh, api_name=False)
        _encoding_bar(gr, catalog, page, bar, run, gallery)
        page.load(None, js=SCRIPT.read_text("utf-8"))
    page.queue(max_size=MAX_WAITING)
    install_checks(gr, page, catalog, folder)
    return page


def _encoding_bar(gr, catalog, page, bar, run, gallery):
    """Show how far photos are encoded, until the gallery that the visitor has chosen is open."""
    timer = gr.Timer(POLL)

    def show_encoding(run: str, gallery: str):
        status = catalog.encoding.status()
        html = gr.HTML(value="".join(map(_bar_html, status)), visible=bool(status))
        return html, gr.Timer(active=bool(status) or not catalog.is_open(run, gallery))

    triggers = [page.load, timer.tick, run.change, gallery.change]
    options = {"queue": False, "api_name": False, "show_progress": "hidden"}
    gr.on(triggers, show_encoding, [run, gallery], [bar, timer], **options)


def _bar_html(status):
    text = escape(status.text)
    value = f'<progress aria-label="{text}" max="1" value="{status.share:.4f}"></progress>'
    return f'<div class="encoding"><p>{text}</p>{value}</div>'


def _captions_tab(gr, catalog, run):
    with gr.Tab("Captions"), gr.Row():
        with gr.Column():
            photo = photo_input(gr, "A photo", "captions-photo")
            button = gr.Button("Find captions", variant="primary", elem_id="find-captions")
        found = gr.Dataframe(
            headers=["score", "caption"],
            label=f"Captions of {RUN_PHOTOS[catalog.split]}",
            scale=3,
            elem_id="captions",
            buttons=[],
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
            photo = photo_input(gr, "A photo", "labels-photo")
            labels = gr.Textbox(label="Labels, one per line", lines=4, placeholder="a dog\na cat", elem_id="labels")
            button = gr.Button("Choose", variant="primary", elem_id="choose")
        chosen = gr.Label(label="Probabilities", num_top_classes=10, scale=2, elem_id="chosen")

    def choose_label(photo: str | None, labels: str, run: str):
        """Return the probability of each label (one per line) for a photo."""
        matches = catalog.searcher(run).classify(check_upload(photo), check_labels(labels))
        return {match.item: match.score for match in matches}

    button.click(choose_label, [photo, labels, run], chosen, concurrency_id="model", api_name="choose_label")


def theme(gr):
    """Return the theme of the page: fonts of the system, none from the internet, and buttons with enough contrast."""
    dark_orange = {f"button_primary_background_fill{mode}": "*primary_700" for mode in ("", "_dark")}
    dark_orange |= {f"button_primary_background_fill_hover{mode}": "*primary_800" for mode in ("", "_dark")}
    fonts = {"font": ["system-ui"], "font_mono": ["monospace"]}
    return gr.themes.Default(**fonts).set(**dark_orange, block_label_text_color="*neutral_600")


def import_gradio():
    """Import Gradio. Raises ValueError with the install command if it is missing."""
    try:
        return importlib.import_module("gradio")
    except ModuleNotFoundError:
        raise ValueError("the page needs gradio: pip install gradio") from None
