"""The tab of the page that searches photos: by a sentence, a photo or both, and by a photo that was found."""

from concurrent.futures import ThreadPoolExecutor
from html import escape
from pathlib import Path
from typing import NamedTuple

from data.image_io import load_image
from runtime.text import display_filename, display_text, format_skipped
from webui.catalog import EXAMPLES, Catalog
from webui.inputs import MAX_MATCHES, VisitorError, check_position, check_sentence, check_upload
from webui.originals import original_link

THUMBNAIL_SIZE = 512  # pixels
# Gradio would show the first photo of the next search alone. The last button above a photo closes it.
LEAVE_SINGLE_VIEW = """() => {
    const buttons = document.querySelectorAll("#found .preview .icon-button-wrapper button");
    if (buttons.length) buttons[buttons.length - 1].click();
}"""
BOTH = "With both, the query is the normalised sum of the two embeddings: this photo, but as the sentence says."


class Found(NamedTuple):
    """The photos that a visitor sees, as `Catalog.photo` takes them."""

    run: str
    gallery: str
    names: list[str]


class _Tab(NamedTuple):
    """The components of the tab that its functions change."""

    sentence: object
    photo: object
    count: object
    button: object
    examples: list
    searched: object
    details: object
    more: object
    found: object
    shown: object  # State: Found
    chosen: object  # State: (run, gallery, name) of the photo that was clicked


def search_tab(gr, catalog: Catalog, page, run, gallery, *, index: str | None, may_have_originals) -> None:
    """Add the tab to a page. run, gallery: the components by which visitors choose.

    may_have_originals: as for build_page.
    """
    tab = _layout(gr)
    searches = _searches(gr, catalog, index)
    inputs, outputs = [tab.sentence, tab.photo, run, gallery, tab.count], [tab.found, tab.searched, tab.shown]
    options = {"concurrency_id": "model"}
    triggers = [tab.button.click, tab.sentence.submit]
    gr.on(triggers, searches["search_photos"], inputs, outputs, api_name="search_photos", **options)
    for example in tab.examples:
        filled = example.click(None, example, tab.sentence, js="text => text")
        filled.then(searches["search_photos"], inputs, outputs, api_name=False, **options)
        triggers.append(example.click)
    more = [tab.chosen, tab.count]
    tab.more.click(searches["more_like_this"], more, outputs, api_name=False, **options)
    gr.on([*triggers, tab.more.click], None, js=LEAVE_SINGLE_VIEW)
    _details(gr, catalog, tab, may_have_originals)

    def show_examples(run: str):
        captions = catalog.examples(run)
        captions += [""] * (EXAMPLES - len(captions))
        return [gr.Button(value=caption, visible=bool(caption)) for caption in captions]

    gr.on([page.load, run.change], show_examples, run, tab.examples, api_name=False, show_progress="hidden")


def _layout(gr):
    with gr.Tab("Photos"), gr.Row():
        with gr.Column():
            with gr.Row(elem_id="query", equal_height=True):
                sentence = gr.Textbox(label="A sentence", placeholder="a dog in snow", elem_id="sentence", scale=3)
                button = gr.Button("Search", variant="primary", elem_id="search", min_width=80)
            with gr.Row(elem_id="examples"):
                examples = [gr.Button(visible=False, size="sm", min_width=0) for _ in range(EXAMPLES)]
            with gr.Accordion("or a photo, or both · how many", open=False, elem_id="more"):
                photo = photo_input(gr, "or a photo, or both", "search-photo")
                gr.Markdown(BOTH)
                count = gr.Slider(1, MAX_MATCHES, value=12, step=1, label="How many", elem_id="count")
        with gr.Column(scale=3):
            searched = gr.HTML(elem_id="searched", label="Searched", padding=False)
            with gr.Row(elem_id="clicked"):
                details = gr.HTML(elem_id="details", visible=False, padding=False)
                more = gr.Button("More like this", elem_id="more-like-this", size="sm", scale=0, visible=False)
            found = gr.Gallery(
                label="Found",
                columns=4,
                height="max-content",
                format="jpeg",
                elem_id="found",
                buttons=["download", "fullscreen"],  # not "share", which would send the photos to another site
            )
    return _Tab(
        sentence, photo, count, button, examples, searched, details, more, found, gr.State(None), gr.State(None)
    )


def _searches(gr, catalog, index):
    """Return the functions that search, by name; each returns thumbnails, a line about the search, and Found."""

    def search_photos(
        sentence: str | None = None, photo: str | None = None, run: str = "", gallery: str = "", count: int = 12
    ):
        """Return the photos that match a sentence, a photo, or both: (thumbnail, score, name, folder), best first.

        With both, the query is the normalised sum of the two embeddings. The second value says what was searched.
        """
        from retrieval.searcher import combine_queries, search_images

        searcher, sentence = catalog.searcher(run), check_sentence(sentence)
        if not sentence and photo is None:
            raise VisitorError("write a sentence or choose a photo")
        for warning in searcher.warnings(sentence) if sentence else ():
            gr.Warning(display_text(warning))
        photo_emb = searcher.embed_images([check_upload(photo)]) if photo else None
        query = combine_queries(searcher.embed_sentences([sentence]) if sentence else None, photo_emb)
        photos = catalog.gallery(run, gallery)
        (matches,) = search_images(query, photos, count, index)
        return _answer(catalog, run, gallery, photos, matches)

    def more_like_this(chosen: tuple[str, str, str] | None, count: int):
        """Return the photos that resemble one that was found, without itself."""
        from retrieval.searcher import search_images

        if chosen is None:
            raise VisitorError("click a photo first")
        run, gallery, name = chosen
        photos = catalog.gallery(run, gallery)
        path = photos.root / name
        query = catalog.searcher(run).embed_images([path])
        (matches,) = search_images(query, photos, count + 1, index)
        matches = [match for match in matches if match.item != path][:count]
        return _answer(catalog, run, gallery, photos, matches, like=path)

    return {"search_photos": search_photos, "more_like_this": more_like_this}


def _answer(catalog, run, gallery, photos, matches, like=None):
    shown = _load_thumbnails(matches)
    names = [match.item.relative_to(photos.root).as_posix() for match, _ in shown]
    folders = [catalog.folder_of(gallery, photos.root, name) for name in names]
    thumbnails = [
        (image, f"{_caption(match)}\n{folder}") for (match, image), folder in zip(shown, folders, strict=True)
    ]
    line = describe_search(len(shown), photos, like, lost=len(matches) - len(shown))
    return thumbnails, line, Found(run, gallery, names)


def describe_search(shown: int, photos, like: Path | None = None, lost: int = 0) -> str:
    """Return the line about a search, as HTML: how many photos it shows, and how many it compared.

    lost: how many of the photos found can no longer be read.
    """
    what = f" photos like {display_filename(like)}" if like is not None else ""
    text = f"The best {shown:,}{what} of {len(photos.names):,} photos searched"
    if lost:
        text += f"; {lost:,} more were found, but deleted or changed since they were encoded"
    if photos.unreadable:
        text += f"; {format_skipped(len(photos.unreadable))}"
    return f'<p role="status">{escape(text)}.</p>'


def _details(gr, catalog, tab, may_have_originals):
    """Show name and folder of the photo that is clicked, and what can be done with it."""

    def show_photo(shown: Found | None, event: gr.SelectData, request: gr.Request):
        name = check_position(event.index, shown.names if shown else [])
        root, _ = catalog.photo(shown.run, shown.gallery, name)
        has_original = may_have_originals(request.headers, request.client.host if request.client else "")
        link = original_link(shown.run, shown.gallery, name) if has_original else ""
        html = describe_photo(name, catalog.folder_of(shown.gallery, root, name), link)
        return gr.HTML(value=html, visible=True), gr.Button(visible=True), (shown.run, shown.gallery, name)

    def hide():
        return gr.HTML(visible=False), gr.Button(visible=False)

    options = {"queue": False, "api_name": False, "show_progress": "hidden"}
    tab.found.select(show_photo, tab.shown, [tab.details, tab.more, tab.chosen], **options)
    tab.found.preview_close(hide, None, [tab.details, tab.more], **options)


def describe_photo(name: str, folder: str, link: str) -> str:
    """Return name and folder of a photo, and the link to its original if it has one, as HTML."""
    original = f' · <a href="{escape(link)}" target="_blank" rel="noopener">the original</a>' if link else ""
    base = escape(display_text(name.rpartition("/")[2]))
    return f'<p class="name">{base}</p><p class="folder">{escape(folder)}{original}</p>'


def photo_input(gr, label: str, elem_id: str):
    """Return a component for an upload, which passes on the path of the file without decoding it."""
    photo = gr.Image(
        label=label, type="filepath", sources=["upload", "clipboard"], height=260, elem_id=elem_id, buttons=[]
    )
    # Gradio would decode any file here. Pass on the path instead, so that `check_upload` sees the file first.
    photo.preprocess = lambda payload: payload and payload.path
    return photo


def _caption(match):
    return f"{match.score:.3f}  {display_filename(match.item)}"


def _load_thumbnails(matches):
    """Return each match with a thumbnail of its photo; photos that no longer exist are skipped."""
    with ThreadPoolExecutor() as pool:
        images = list(pool.map(_thumbnail, [match.item for match in matches]))
    return [(match, image) for match, image in zip(matches, images, strict=True) if image is not None]


def _thumbnail(path: Path):
    """Return the photo, at most THUMBNAIL_SIZE pixels wide and high, or None if it cannot be read."""
    from PIL import Image

    try:
        image = Image.fromarray(load_image(path, THUMBNAIL_SIZE))
    except OSError:
        return None
    image.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
    return image
