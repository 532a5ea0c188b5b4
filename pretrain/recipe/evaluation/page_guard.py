"""What a request to the page of chat.py must be: from this machine's own page, short, and no upload.

A page that listens on 127.0.0.1 can still be reached by any web page in the same browser: by a form or a
script of another site (its Origin differs), and by a site whose name is changed to 127.0.0.1 after the
browser has loaded it (DNS rebinding; its Host differs).
"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

HOSTS = ("127.0.0.1", "localhost")
MAXIMUM_BODY = 2**20  # bytes of a request: a conversation; longer texts do not fit into a model's context


class PageGuard:
    """ASGI middleware that answers a request with 403, 411 or 413 unless it is allowed (`fault_of`)."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Pass a request on, or answer it; nothing of a refused request's body is read."""
        fault = fault_of(scope) if scope["type"] in ("http", "websocket") else None
        if fault is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            status, reason = fault
            headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": reason.encode("utf-8")})


def fault_of(scope: dict[str, Any]) -> tuple[int, str] | None:
    """The HTTP status and the reason why a request is refused; None if it is allowed.

    scope: of ASGI. Any port of a loopback name is allowed, so that a page behind ``ssh -L`` works.
    """
    headers: dict[str, list[str]] = {}
    for name, value in scope["headers"]:
        headers.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    hosts, origins = headers.get("host", []), headers.get("origin", [])
    if len(hosts) != 1 or _name(f"//{hosts[0]}") not in HOSTS:
        return 403, f"Host {hosts}: expected {' or '.join(HOSTS)}, with a port"
    if any(origin != f"http://{hosts[0]}" for origin in origins):
        return 403, f"Origin {origins}: expected http://{hosts[0]}, the page itself"
    if "upload" in scope["path"]:
        return 403, "this page takes text and no files"
    if "transfer-encoding" in headers:
        return 411, "expected a request with a Content-Length"
    length = headers.get("content-length", ["0"])[0]
    if not length.isdecimal() or int(length) > MAXIMUM_BODY:
        return 413, f"the request has {length} bytes, at most {MAXIMUM_BODY:,} are read"
    return None


def _name(url: str) -> str | None:
    """The name of the host in a URL; None where it has none or is no URL."""
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
