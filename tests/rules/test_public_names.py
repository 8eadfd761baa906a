"""The Python door offers exactly what it says."""

from __future__ import annotations

import phinetune


def test_public_names_are_sorted_and_exist() -> None:
    assert phinetune.__all__ == sorted(phinetune.__all__)
    assert dir(phinetune) == phinetune.__all__


def test_version_is_that_of_the_package() -> None:
    from importlib.metadata import version

    assert phinetune.__version__ == version("phinetune")
