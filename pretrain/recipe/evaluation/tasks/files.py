"""The files that the questions of our own tasks are read from: a user's folder, or one download into data/.

Downloaded, each at one commit: JGLUE (Kurihara et al., 2022; CC BY-SA 4.0), Japanese COPA (Tokyo Institute of
Technology, 2023; BSD 2-Clause), JMMLU (Yin et al., 2024; CC BY-SA 4.0, three subjects CC BY-NC-ND 4.0).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from recipe.config.tasks import metadata
from recipe.corpus.fetch import fetch
from recipe.project import DATA, RecipeError, user_path

_RAW = "https://raw.githubusercontent.com"
_JGLUE = f"{_RAW}/yahoojapan/JGLUE/6f071c09316baae89c3d083a90985b4b1cb9968c/datasets"  # release 1.3.0
_COPA = f"{_RAW}/nlp-titech/copa-japanese/62a3f8b03d38eab02569e231edb976417ac53b7f"
_JMMLU = "https://github.com/nlp-waseda/JMMLU/archive/762cbf192c9e4588b574d718f95afd64c96fcbf4.tar.gz"
# By task and side: the URL. In a user's folder, the files are found by the patterns of their set.
_URLS = {
    **{
        name: {side: f"{_JGLUE}/{name}-v1.3/{file}-v1.3.json" for side, file in sides}
        for name, sides in dict.fromkeys(
            ("jcommonsenseqa", "jnli", "jsquad"), (("train", "train"), ("test", "valid"))
        ).items()
    },
    "copa-ja": {"test": f"{_COPA}/COPA-ja.jsonl"},
    "jmmlu": {"test": _JMMLU},
}
_PATTERNS = {
    "jglue": {"train": "train-*.json", "test": "valid-*.json"},
    "copa-ja": {"test": "COPA-ja.jsonl"},
    "jmmlu": {"test": "*.tar.gz"},
}
# The other files have no hash here: only the commit identifies them.
_SHA256 = {
    "jcommonsenseqa/train": "9b55fae5ecb3aedd6f8ce5bc09196c3b629864668ec6c18eee4d65c0aa48229e",
    "jcommonsenseqa/test": "0d8d76f3bfa0d174866939882faccdd01fbc2bcd5a76c43748ba0c40a7b3b8d4",
    "jnli/test": "ca0353efc7c2eebfb6de4e13f16295053c8b1ee65e7b0849190c90426fbc495f",
    "jsquad/test": "fb0a57a35281ff03bbe7f0e878cff5b577985fbe6fcb242e7e8ddb63d1c0ab11",
    "copa-ja/test": "c46584a8c184f4af3d7d2561059d6269a7726356c737b1147fa19527cd0a3bd5",
}


def files_of(name: str, spec: dict[str, str]) -> dict[str, Path]:
    """The files of a task by side, ``test`` and, for shots, ``train``; downloaded if they are not there.

    name: of a task whose metadata say ``files``. spec: its entry in evaluation.json. Raises RecipeError for a
    folder without the files.
    """
    if "path" in spec:
        return _in_folder(name, user_path(spec["path"]))
    found = _downloaded(name)
    for side, path in found.items():
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with _alone_in(path.parent):
                if not path.exists():
                    fetch(_URLS[name][side], path, _SHA256.get(f"{name}/{side}"))
    return found


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other run downloads into a folder: two at once would write into one .part.

    The lock is on the folder itself, so that nothing is left behind. Without locks (some mounted drives) it
    does not wait.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def to_download(name: str, spec: dict[str, str]) -> str | None:
    """The URL of a file of a task that must be downloaded first; None when all are there."""
    paths = {} if "path" in spec else _downloaded(name)
    return next((_URLS[name][side] for side, path in paths.items() if not path.exists()), None)


def _in_folder(name: str, folder: Path) -> dict[str, Path]:
    found = {}
    for side, pattern in _PATTERNS[metadata(name)["files"]].items():
        files = sorted(folder.glob(pattern))
        if len(files) != 1:
            raise RecipeError(
                f"evaluation.json: tasks.{name}.path: {folder}: {len(files)} files {pattern}, not one. "
                f"Give the folder with the {' and '.join(_PATTERNS[metadata(name)['files']].values())} of "
                "this task"
            )
        found[side] = files[0]
    return found


def _downloaded(name: str) -> dict[str, Path]:
    """Where the downloaded files of a task are, or will be."""
    folder = DATA / "jglue" / name if metadata(name)["files"] == "jglue" else DATA / name
    return {side: folder / url.rsplit("/", 1)[1] for side, url in _URLS[name].items()}
