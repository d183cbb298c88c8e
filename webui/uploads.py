"""Check the photos of an upload once it has arrived, before Gradio stores them."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from data.image_io import load_image
from data.records import IMAGE_SUFFIXES
from data.storage import HEIF_SUFFIXES
from runtime.text import display_text
from webui.inputs import VisitorError, check_pixels
from webui.request_body import CHUNK, Refused

DECODED_SIZE = 64  # pixels; a JPEG is decoded at a reduced scale, which still reads all of it


def check_photos(body: BinaryIO, headers: Mapping[str, str], folder: Path) -> None:
    """Raise Refused, with the file's name, if a file of an upload is no photo, is cut off or has too many pixels.

    body: a form that `form_checker` has accepted. folder: where each file is written for the check, and deleted.
    """
    from python_multipart import MultipartParser
    from python_multipart.multipart import parse_options_header

    boundary = parse_options_header(headers["content-type"])[1][b"boundary"]
    files = _Files(folder)
    names = ("part_begin", "part_data", "part_end", "header_field", "header_value", "header_end", "headers_finished")
    parser = MultipartParser(boundary, {f"on_{name}": getattr(files, name) for name in names})
    try:
        body.seek(0)
        while chunk := body.read(CHUNK):
            parser.write(chunk)
    finally:
        files.close()
        body.seek(0)


class _Files:
    """The parser's callbacks, which write each file of the form and check it at its end."""

    def __init__(self, folder):
        self.folder, self.file = folder, None
        self.name, self.field, self.value = "", b"", b""

    def part_begin(self):
        self.name, self.field, self.value = "", b"", b""

    def header_field(self, data, start, end):
        self.field += data[start:end]

    def header_value(self, data, start, end):
        self.value += data[start:end]

    def header_end(self):
        from python_multipart.multipart import parse_options_header

        if self.field.lower() == b"content-disposition":
            name = parse_options_header(self.value)[1].get(b"filename", b"")
            self.name = name.decode("utf-8", "replace").replace("\\", "/").rpartition("/")[2]
        self.field, self.value = b"", b""

    def headers_finished(self):
        suffix = Path(self.name).suffix.lower()
        known = suffix if suffix in (*IMAGE_SUFFIXES, *HEIF_SUFFIXES) else ""
        self.file = tempfile.NamedTemporaryFile(dir=self.folder, suffix=known)  # noqa: SIM115

    def part_data(self, data, start, end):
        self.file.write(data[start:end])

    def part_end(self):
        self.file.flush()
        try:
            _check_photo(Path(self.file.name), display_text(self.name, 80) or "the upload")
        finally:
            self.close()

    def close(self):
        if self.file is not None:
            self.file.close()  # deletes it
            self.file = None


def _check_photo(path, name):
    try:
        check_pixels(path, name)
        load_image(path, DECODED_SIZE)
    except VisitorError as error:
        raise Refused(415, str(error)) from None
    except OSError as error:
        reason = display_text(str(error).removeprefix(f"{path}: "), 200)
        raise Refused(415, f"{name} is not a photo that can be read: {reason}") from None
