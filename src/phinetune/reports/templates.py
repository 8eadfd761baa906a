"""Fill the templates beside this file: every text is escaped, a missing value is an error.

Knows nothing of what the pages say.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def filled(template: str, /, **values: Any) -> bytes:
    """The page as UTF-8; a lone surrogate in somebody's text has no such form and becomes "?"."""
    return _environment().get_template(template).render(**values).encode("utf-8", "replace")


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("phinetune.reports", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
