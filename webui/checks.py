"""Put the checks of visitors' input in front of every endpoint of a Gradio page, whatever address it is called by."""

import sys
from pathlib import Path

from runtime.text import display_text
from webui import inputs as check
from webui.catalog import Catalog

FAILED = "this did not work, and the reason stands in the terminal of the page"


def install_checks(gr, page, catalog: Catalog, folder: Path) -> None:
    """Check all inputs of a page before Gradio's components see them, and turn every error into one public line.

    folder: the only one whose files may be named. Nothing prints a traceback.
    """
    preprocess_data, process_api = page.preprocess_data, page.process_api

    async def checked_preprocess_data(block_fn, inputs, *args, **kwargs):
        return await preprocess_data(block_fn, check_inputs(gr, block_fn.inputs, inputs, folder), *args, **kwargs)

    async def quiet_process_api(*args, **kwargs):
        try:
            return await process_api(*args, **kwargs)
        except Exception as error:
            raise public_error(gr, catalog, error) from None

    page.preprocess_data, page.process_api = checked_preprocess_data, quiet_process_api


def check_inputs(gr, components: list, values: list, folder: Path) -> list:
    """Return the values for the components. Raises VisitorError for any that a component of its kind cannot have."""
    if len(values) != len(components):
        raise check.VisitorError(f"this needs {len(components)} values, got {len(values)}")
    return [_check_input(gr, component, value, folder) for component, value in zip(components, values, strict=True)]


def _check_input(gr, component, value, folder):
    if isinstance(component, gr.Image):
        path = check.check_file(value, folder)
        return path and {"path": path, "meta": {"_type": "gradio.FileData"}}
    if isinstance(component, gr.State):
        return None  # Gradio reads the server's own copy
    if isinstance(component, gr.Textbox):
        (check.check_labels if component.elem_id == "labels" else check.check_sentence)(value)
        return value
    if isinstance(component, gr.Slider):
        return check.check_count(value)
    if isinstance(component, gr.Dropdown):
        return check.check_choice(value, [choice for _, choice in component.choices], component.label.lower())
    raise check.VisitorError("this endpoint takes no such value")


def public_error(gr, catalog: Catalog, error: Exception):
    """Return the gr.Error for visitors, without a path of the machine; prints one line unless it is their mistake."""
    if isinstance(error, check.VisitorError):
        return gr.Error(display_text(error, 500), print_exception=False)
    if isinstance(error, gr.Error):
        message = catalog.public_error(error.message)
    elif isinstance(error, (ValueError, OSError)):
        message = catalog.public_error(error)
    else:
        message = None
    if message is None or isinstance(error, OSError):
        reason = " ".join(str(error).split())
        line = display_text(f"{type(error).__name__}: {reason}", 500)
        print(line, file=sys.stderr, flush=True)
    return gr.Error(message or FAILED, print_exception=False)
