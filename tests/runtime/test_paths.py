"""A name from an untrusted file never becomes a path outside its folder."""

import pytest

from runtime.paths import path_below


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "..", ".", "", "a\0b", "link/x"])
def test_name_that_points_outside_the_folder_is_an_error(tmp_path, name):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match=r"points outside|NUL"):
        path_below(tmp_path / "root", name)


@pytest.mark.parametrize("name", ["x", "a/b.png", "..x", "a/../x", "图.jpg"])
def test_name_inside_the_folder_is_joined(tmp_path, name):
    assert path_below(tmp_path, name) == tmp_path / name
