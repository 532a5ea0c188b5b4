"""Notices a web page that was saved where data is expected, such as the login page of a site."""

from __future__ import annotations

import re

from recipe.project import RecipeError

_BEGIN = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*(?:<!--.*?-->\s*)?<(?:!doctype\s+html|html|head)\b", re.I | re.DOTALL
)


def refuse_web_page(head: bytes, where: str) -> None:
    """Raise RecipeError if a file begins as HTML does. head: its first bytes. where: its name."""
    if _BEGIN.match(head[:4096]):
        raise RecipeError(
            f"{where}: an HTML page and no data: probably a login or error page that was saved in its place. "
            "Open the address in a browser, log in or accept the terms, and get the file again"
        )
