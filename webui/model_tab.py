"""The tab of the page that says in words how good the chosen model is, with its curves and settings."""

from html import escape
from pathlib import Path

from runtime.run_dir import CURVES, read_config, read_log, read_metrics
from runtime.text import display_text, shell_argument
from webui.catalog import Catalog, display_name
from webui.inputs import VisitorError, load_picture

CURVES_SIZE = 3000  # pixels
KS = (1, 5, 10)
DIRECTIONS = {"t2i": "a photo for a sentence", "i2t": "a sentence for a photo"}
VALIDATION = "validation, measured by training"


def model_tab(gr, catalog: Catalog, run, page) -> None:
    """Add the tab to a page. run: the component by which visitors choose a run."""
    with gr.Tab("Model"):
        words = gr.HTML(elem_id="about", label="Recall", padding=False)
        curves = gr.Image(
            label="Training curves", format="png", interactive=False, buttons=["fullscreen"], elem_id="curves"
        )
        with gr.Accordion("All figures of python evaluate.py: recall and mAP in percent, median ranks", open=False):
            metrics = gr.Dataframe(label="Figures", elem_id="metrics", buttons=[])
        settings = gr.JSON(label="Settings", elem_id="settings", buttons=[])

    def about(run: str):
        """Return a run's metrics by split, its training curves, its settings, and its recall in words (HTML)."""
        folder = catalog.runs[run]
        if folder is None:
            return _table({}), None, {"model": run}, describe_pretrained(catalog.model)
        metrics_by_split = read_metrics(folder)
        try:
            curves_image = load_picture(folder / CURVES, CURVES_SIZE) if (folder / CURVES).exists() else None
        except VisitorError as error:
            gr.Warning(str(error))
            curves_image = None
        words = describe_run(folder, metrics_by_split)
        return _table(metrics_by_split), curves_image, _public_settings(folder), words

    outputs = [metrics, curves, settings, words]
    gr.on([page.load, run.change], about, run, outputs, api_name="about")


def _table(metrics_by_split):
    names = list(dict.fromkeys(name for values in metrics_by_split.values() for name in values))
    rows = [
        [split, *(_rounded(values[name]) if name in values else "" for name in names)]
        for split, values in metrics_by_split.items()
    ]
    return {"headers": ["split", *names], "data": rows}


def _rounded(value):
    return round(value, 1) if isinstance(value, int | float) else value


def _public_settings(folder):
    return {
        name: display_name(value) if isinstance(value, str) else value
        for name, value in vars(read_config(folder)).items()
        if not name.endswith("_dir")
    }


def describe_pretrained(model: str) -> str:
    """Return the words about a pretrained model, which has no measurements, as HTML."""
    name = display_name(model)
    command = f"python evaluate.py --model {_argument(model, 'MODEL')} --dataset YOUR_DATA_SET"
    return (
        f'<div class="about"><p>{escape(display_text(name, 120))} is a pretrained model, not a run of this program: how'
        " well it finds photos is not measured.</p>"
        f"<p>To measure it on photos with captions: <code>{escape(command)}</code></p></div>"
    )


def describe_run(folder: Path, metrics_by_split: dict) -> str:
    """Return a run's recall as an HTML table, what the figures mean, and the command for what is not yet measured.

    Before `evaluate.py` the figures are those of the best epoch on the validation split, from the run's log.
    """
    measured = {split: values for split, values in metrics_by_split.items() if _has_recall(values)}
    best = best_epoch(folder)
    tables = measured | ({f"{VALIDATION}, epoch {best['epoch']}": best} if best and not measured else {})
    parts = [_recall_table(split, values) for split, values in tables.items()]
    if tables:
        parts.append(_meaning(next(iter(tables.values()))))
    command = f"python evaluate.py {_argument(folder, 'RUN')} --split test"
    if not tables:
        parts.append("<p>Nothing is measured yet: the log of the run has no recall.</p>")
    if not any(split.split(",")[0] == "test" for split in measured):
        missing = "The test split, whose photos were used neither to train nor to choose the epoch, is not measured yet"
        parts.append(f"<p>{missing}: <code>{escape(command)}</code></p>")
    return f'<div class="about">{"".join(parts)}</div>'


def _argument(path, placeholder):
    """Return a path for a command; a placeholder for an absolute one, which visitors are not shown."""
    return placeholder if Path(path).expanduser().is_absolute() else shell_argument(path)


def best_epoch(folder: Path) -> dict | None:
    """Return the record of the epoch with the highest rsum, whose weights the page uses; None without a log."""
    records = [record for record in read_log(folder) if _has_recall(record) and _is_number(record.get("rsum"))]
    return max(records, key=lambda record: record["rsum"], default=None)


def _has_recall(values):
    return all(_is_number(values.get(f"{direction}_R@{k}")) for direction in DIRECTIONS for k in KS)


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def _recall_table(split, values):
    head = "".join(f'<th scope="col">R@{k}</th>' for k in KS)
    rows = "".join(
        f'<tr><th scope="row">{words}</th>'
        + "".join(f"<td>{values[f'{direction}_R@{k}']:.1f} %</td>" for k in KS)
        + "</tr>"
        for direction, words in DIRECTIONS.items()
    )
    caption = escape(display_text(split, 120))
    return (
        f'<table class="recall"><caption>{caption}</caption><thead><tr><th scope="col">To find</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )


def _meaning(values):
    hits = [round(values[f"t2i_R@{k}"]) for k in KS]
    return (
        f"<p>R@5 is the share of queries with a right answer among the first 5 found. Here, of 100 sentences, {hits[0]}"
        f" find their photo as the first match, {hits[1]} among the first 5 and {hits[2]} among the first 10. Each"
        " search compares the query with everything in the split: in a larger collection the figures are lower, in a"
        " smaller one higher.</p>"
    )
