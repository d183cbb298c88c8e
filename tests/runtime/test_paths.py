"""A name from someone else's file never becomes a path outside its folder."""

import pytest

from runtime.paths import path_below


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "..", ".", "", "a\0b", "link/x"])
def test_a_name_that_leads_out_is_refused(tmp_path, name):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match=r"leads out of|NUL"):
        path_below(tmp_path / "root", name)


@pytest.mark.parametrize("name", ["x", "a/b.png", "..x", "a/../x", "图.jpg"])
def test_a_name_that_stays_inside_is_joined(tmp_path, name):
    assert path_below(tmp_path, name) == tmp_path / name
