"""Names of random streams."""

import hashlib

import pytest

from ibmd_cli.method.numpy_noise import seed_of


@pytest.mark.parametrize("name", ["plain.png", "Zoë.png", "猫/犬.png", "new\nline \\udcc3"])
def test_a_name_gives_one_seed_in_every_locale(name: str):
    """In the C locale Python reads each byte of a name beyond ASCII as a lone surrogate."""
    in_c = name.encode().decode("ascii", "surrogateescape")
    assert seed_of(3, "sample", in_c, 1) == seed_of(3, "sample", name, 1)
    digest = hashlib.sha256(repr((3, "sample", name, 1)).encode()).digest()
    assert seed_of(3, "sample", name, 1) == int.from_bytes(digest[:8], "little", signed=True)


def test_bytes_that_are_no_text_have_a_seed_of_their_own():
    names = [content.decode("utf-8", "surrogateescape") for content in (b"\xff.png", b"\xfe.png", b"x.png")]
    assert len({seed_of(0, name) for name in names}) == 3
