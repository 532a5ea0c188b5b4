"""Requests to the page of chat.py: what another site, a flood or an upload sends is refused unread."""

import asyncio

import pytest
from recipe.evaluation.page_guard import MAXIMUM_BODY, PageGuard

LOCAL = ("host", "127.0.0.1:7860")
ATTACKS = {
    "rebinding": ("/", [("host", "evil.example:7860")], 403),
    "a name that ends as ours": ("/", [("host", "localhost.evil.example")], 403),
    "a user in the name": ("/", [("host", "127.0.0.1@evil.example")], 403),
    "no name": ("/", [], 403),
    "two names": ("/", [LOCAL, ("host", "evil.example")], 403),
    "no URL": ("/", [("host", "[::1")], 403),
    "another site": ("/gradio_api/call/chat", [LOCAL, ("origin", "https://evil.example")], 403),
    "another page of this machine": (
        "/gradio_api/call/chat",
        [LOCAL, ("origin", "http://127.0.0.1:80")],
        403,
    ),
    "a local file": ("/gradio_api/call/chat", [LOCAL, ("origin", "null")], 403),
    "an upload": ("/gradio_api/upload", [LOCAL], 403),
    "progress of an upload": ("/gradio_api/upload_progress", [LOCAL], 403),
    "20 MB": ("/gradio_api/call/chat", [LOCAL, ("content-length", str(20 * 2**20))], 413),
    "a negative length": ("/gradio_api/call/chat", [LOCAL, ("content-length", "-1")], 413),
    "no length": ("/gradio_api/call/chat", [LOCAL, ("transfer-encoding", "chunked")], 411),
}


def answered(path, headers, kind="http"):
    """What is sent back, and whether the request came through."""
    sent, passed = [], []

    async def app(scope, receive, send):
        passed.append(scope["path"])

    async def receive():
        raise AssertionError("the body of a refused request is read")

    async def send(message):
        sent.append(message)

    scope = {"type": kind, "path": path, "headers": [(k.encode(), v.encode()) for k, v in headers]}
    asyncio.run(PageGuard(app)(scope, receive, send))
    return sent, bool(passed)


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_answered_with_its_reason_and_not_read(attack):
    path, headers, status = ATTACKS[attack]
    sent, passed = answered(path, headers)
    assert not passed and sent[0]["status"] == status and len(sent[1]["body"]) > 20
    assert answered(path, headers, "websocket") == ([{"type": "websocket.close", "code": 1008}], False)


@pytest.mark.parametrize(
    "headers",
    [
        [LOCAL],
        [("host", "localhost:8000"), ("origin", "http://localhost:8000")],
        [LOCAL, ("content-length", str(MAXIMUM_BODY))],
    ],
)
def test_the_page_itself_comes_through(headers):
    assert answered("/gradio_api/call/chat", headers) == ([], True)
