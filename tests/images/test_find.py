"""Which files of folders and globs are images."""

import os

import pytest
from imagefiles import quarters

from ibmd_cli.errors import IbmdError
from ibmd_cli.images.find import find_images, find_matches


def test_find_images(tmp_path):
    picture = quarters()
    for name in ["b.png", "a.JPG", "sub/c.webp", "sub/deep/d.tif", ".hidden.png", ".cache/e.png", "notes.txt"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / name, "PNG")
    for name in ["b.ibmd.png", "b.ibmd.12.png", "sub/c.ibmd.png"]:
        picture.save(tmp_path / name)
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    (tmp_path / "link.png").symlink_to(tmp_path / "b.png")
    (tmp_path / "broken.png").symlink_to(tmp_path / "absent.png")

    def names(**options) -> list[str]:
        return [str(f.relative_to(tmp_path)) for f in find_images(tmp_path, **options)]

    assert names(recursive=False) == ["a.JPG", "b.png", "link.png"]
    assert names() == ["a.JPG", "b.png", "link.png", "sub/c.webp", "sub/deep/d.tif"]
    assert names(without=tmp_path / "sub" / "deep") == ["a.JPG", "b.png", "link.png", "sub/c.webp"]
    assert find_images(tmp_path / "b.png") == [tmp_path / "b.png"]


def test_find_matches(tmp_path):
    for name in ("a/x.png", "a/y.jpg", "a/b/x.png", "a/b/c/x.png", "a/.hid/x.png", "a/.x.png", "a/x.ibmd.png", "n.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for i in range(3):  # a search that followed them would not end
        (tmp_path / "a" / f"loop{i}").symlink_to(tmp_path)
    (tmp_path / "a" / "link.png").symlink_to("x.png")

    def names(pattern: str) -> list[str]:
        folder, found = find_matches(f"{tmp_path}/{pattern}", pytest.fail)
        assert folder == tmp_path / ("" if pattern[0] in "*[" else "a")
        return [str(path.relative_to(tmp_path)) for path in found]

    assert names("**/x.png") == ["a/b/c/x.png", "a/b/x.png", "a/x.png"]
    assert names("a/**/b/**/*.png") == ["a/b/c/x.png", "a/b/x.png"]
    assert names("a/*.png") == ["a/link.png", "a/x.png"]
    assert names("a/?.[jp]*g") == ["a/x.png", "a/y.jpg"]
    assert names("*/*/x.png") == ["a/b/x.png"]
    assert names("[a]/*") == ["a/b", "a/link.png", "a/x.png", "a/y.jpg"]
    assert names("a/**") == names("a/**/*")
    assert names("a/.h*/*.png") == ["a/.hid/x.png"]
    assert names("a/*/absent/*") == []
    assert find_matches(str(tmp_path / "absent/*.png"), pytest.fail) == (tmp_path / "absent", [])
    assert find_matches(str(tmp_path / "absent.png"), pytest.fail)[1] == []
    errors: list[OSError] = []
    find_matches(str(tmp_path / "n.txt/*.png"), errors.append)
    assert [error.filename for error in errors] == [str(tmp_path / "n.txt")]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_unreadable_folder(tmp_path):
    (tmp_path / "locked").mkdir(mode=0)
    with pytest.raises(IbmdError, match="locked"):
        find_images(tmp_path)
