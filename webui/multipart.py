"""Check an upload while it arrives: only files, few of them, each with a short header, all together within a limit."""

from collections.abc import Callable, Mapping

from webui.request_body import Refused

MAX_PARTS = 20
MAX_HEADER = 8_000  # bytes of a part's header


def form_checker(headers: Mapping[str, str], max_bytes: int) -> Callable[[bytes], None]:
    """Return a function that takes the chunks of a form, and raises Refused for the first that is not accepted.

    Raises Refused itself if the request is no form. A form's fields without a file are refused: Gradio would keep
    them in memory.
    """
    from python_multipart import MultipartParser
    from python_multipart.exceptions import MultipartParseError
    from python_multipart.multipart import parse_options_header

    kind, options = parse_options_header(headers.get("content-type", ""))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise Refused(400, "an upload must be multipart/form-data with a boundary")
    checker = _Checker(max_bytes)
    parser = MultipartParser(options[b"boundary"], checker.callbacks())

    def check(chunk: bytes) -> None:
        try:
            parser.write(chunk)
        except MultipartParseError:
            raise Refused(400, "the upload is not a valid form") from None

    return check


class _Checker:
    """The parser's callbacks, which count what arrives."""

    def __init__(self, max_bytes):
        self.max_bytes, self.parts, self.bytes = max_bytes, 0, 0
        self.header, self.is_file, self.field, self.value = 0, False, b"", b""  # of the current part

    def callbacks(self):
        names = ("part_begin", "part_data", "header_field", "header_value", "header_end", "headers_finished")
        return {f"on_{name}": getattr(self, name) for name in names}

    def part_begin(self):
        self.parts += 1
        self.header, self.is_file, self.field, self.value = 0, False, b"", b""
        if self.parts > MAX_PARTS:
            raise Refused(400, f"the upload has more than {MAX_PARTS} files")

    def header_field(self, data, start, end):
        self.field += data[start:end]
        self._count_header(end - start)

    def header_value(self, data, start, end):
        self.value += data[start:end]
        self._count_header(end - start)

    def _count_header(self, length):
        self.header += length
        if self.header > MAX_HEADER:
            raise Refused(400, f"a file of the upload has a header of more than {MAX_HEADER:,} bytes")

    def header_end(self):
        from python_multipart.multipart import parse_options_header

        if self.field.lower() == b"content-disposition":
            self.is_file = b"filename" in parse_options_header(self.value)[1]
        self.field, self.value = b"", b""

    def headers_finished(self):
        if not self.is_file:
            raise Refused(400, "an upload consists of files: a field without a file is not accepted")

    def part_data(self, data, start, end):
        self.bytes += end - start
        if self.bytes > self.max_bytes:
            raise Refused(413, f"the files of the upload are larger than {self.max_bytes / 1e6:g} MB")
