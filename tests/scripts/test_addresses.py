"""Scripts say in one line that addresses are not fetched."""

import pytest
from helpers import one_line_error, run_in_process


@pytest.mark.parametrize(
    "arguments",
    [
        ("infer", "--image", "https://example.org/dog.jpg"),
        ("infer", "a dog", "--gallery", "s3://bucket/photos"),
        ("train", "--dataset", "gs://bucket/photos"),
    ],
)
def test_an_address_is_refused_in_one_line(arguments):
    assert "are not fetched" in one_line_error(run_in_process(*arguments))
