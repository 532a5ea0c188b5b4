"""Messages about a training to the user's webhook. A webhook that does not answer delays nothing."""

from __future__ import annotations

import atexit
import http.client
import json
import os
import platform
import threading
import urllib.request
from pathlib import Path

from recipe.project import warn

SECONDS = 10.0  # that a message may take, and for which an ending process waits for it


def send_message(folder: Path, message: str) -> None:
    """POST a message to the address in RECIPE_WEBHOOK, in the form that Slack, Mattermost and Discord read.

    It is sent by a thread of its own; a failure is only a warning. Without an address, nothing happens.

    folder: the work folder of the training; the message begins with its stage, its recipe and this machine.
    """
    address = os.environ.get("RECIPE_WEBHOOK")
    if not address:
        return
    stage = folder.name.removeprefix(".").removesuffix(".work")
    text = f"{stage} of recipe {folder.parent.name} on {platform.node()}: {message}"
    thread = threading.Thread(target=_post, args=(address, text), daemon=True)
    thread.start()
    atexit.register(thread.join, SECONDS)


def _post(address: str, text: str) -> None:
    body = json.dumps({"text": text, "content": text}).encode()
    try:
        request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
        urllib.request.urlopen(request, timeout=SECONDS).close()
    except (OSError, ValueError, http.client.HTTPException) as error:
        warn(f"RECIPE_WEBHOOK could not be called: {error}")
