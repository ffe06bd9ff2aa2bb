"""Which files of folders and globs are images."""

import os
from collections import Counter
from pathlib import Path

import pytest
from imagefiles import quarters

from ibmd_cli.errors import IbmdError
from ibmd_cli.images.find import find_images, find_matches, named_path, passed_over


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


def test_what_is_passed_over_is_counted_by_kind(tmp_path):
    names = ["a.heic", "b.HEIC", "c.PNG", "d.svg", "e", "f.ibmd.png", ".hidden.heic", "sub/g.heic", "sub/h.pgm"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "gone.png").symlink_to("absent")
    (tmp_path / "loop").symlink_to(tmp_path)

    def told(**options) -> tuple[list[str], str]:
        passed = Counter[str]()
        found = find_images(tmp_path, passed=passed, **options)
        return [file.name for file in found], passed_over(passed)

    assert told(recursive=False) == (
        ["c.PNG"],
        "passed over 4 files (2 .heic, 1 .svg, 1 without an ending): "
        "expected PNG, JPEG, WebP, TIFF, BMP, PNM, GIF or AVIF; passed over 2 folders: --recursive searches them; "
        "passed over 1 earlier result; passed over 1 special file; "
        "passed over 1 broken link",
    )
    found, text = told()
    assert found == ["c.PNG", "h.pgm"]
    assert text.startswith("passed over 5 files (3 .heic, 1 .svg")
    assert "passed over 1 linked folder: give them by themselves" in text


def test_nothing_is_said_where_nothing_is_passed_over(tmp_path):
    quarters().save(tmp_path / "a.png")
    passed = Counter[str]()
    assert find_images(tmp_path, passed=passed) == [tmp_path / "a.png"]
    assert passed_over(passed) == ""


def test_many_kinds_are_cut_to_the_most_frequent(tmp_path):
    for i in range(9):
        for j in range(9 - i):
            (tmp_path / f"{j}.x{i}").touch()
    passed = Counter[str]()
    assert find_images(tmp_path, passed=passed) == []
    assert passed_over(passed).startswith("passed over 45 files (9 .x0, 8 .x1, 7 .x2, 6 .x3, 5 .x4, 4 .x5, 6 others): ")


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("a.png", "a.png"),
        ("*.png", "*.png"),
        ("'a b.png'", "a b.png"),
        ('"a b.png"', "a b.png"),
        ("'", "'"),
        ("~/a.png", "/home/someone/a.png"),
        ("'~/a.png'", "/home/someone/a.png"),
        ("file:///a/b%20c.png", "/a/b c.png"),
        ("file://localhost/a/%C3%BC.png", "/a/ü.png"),
        ("FILE:///a/latin%E9.png", "/a/latin\udce9.png"),
        ("file:/a/b.png", "/a/b.png"),
        ("file:a/b%20c.png", "a/b c.png"),
        ("file:///a/100%25%23.png", "/a/100%#.png"),
        (" a.png ", "a.png"),
        ("'/a b.png' ", "/a b.png"),
        ("C:/a.png", "C:/a.png"),
    ],
)
def test_paths_as_people_write_them(text, path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert named_path(text) == path


@pytest.mark.parametrize("name", ["'quoted.png'", "~", "https:", " spaced.png ", "data:x", "file:x"])
def test_a_file_of_that_very_name_goes_before(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(name).touch()
    assert named_path(name) == name


@pytest.mark.parametrize("scheme", ["http", "https", "s3", "gs", "ftp", "hf", "HTTPS"])
def test_other_addresses_are_refused_by_name(scheme):
    address = f"{scheme}://host.org/a%20b.png"
    with pytest.raises(IbmdError) as caught:
        named_path(address)
    assert str(caught.value).startswith(f"{address}: addresses ({scheme}://) are not read: fetch it first")


def test_data_that_stand_in_an_address_are_refused_in_a_short_line():
    with pytest.raises(IbmdError) as caught:
        named_path("data:image/png;base64," + "A" * 10_000)
    assert "addresses (data:) are not read" in str(caught.value)
    assert len(str(caught.value)) < 400


def test_an_address_with_a_nul_is_refused():
    with pytest.raises(IbmdError, match="no path"):
        named_path("file:///a%00b.png")


def test_a_file_of_another_machine_is_refused():
    with pytest.raises(IbmdError, match="file://host/a.png: a file of another machine"):
        named_path("file://host/a.png")
