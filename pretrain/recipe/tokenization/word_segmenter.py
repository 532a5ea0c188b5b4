"""Splits Japanese text into words by Juman++, MeCab or Sudachi; `join` restores the text exactly.

The form that a tokenizer reads:

- A single space separates two words; a plain space is never anything else.
- White space of the text becomes a visible mark, which is a word of its own: ``▁`` (U+2581) for a space,
  ``␉`` (U+2409) for a tab, ``␊`` (U+240A) for a line end, and ``␛`` (U+241B) with four hex digits for any
  other, so that U+3000 is ``␛3000``. A line end also stays after its mark: line N of a text is line N of its
  segmentation.
- A mark that is part of the text gets ``␛`` in front: ``▁`` becomes ``␛▁``.

    私はLinux 6.1を使う。   ->   私 は Linux ▁ 6 . 1 を 使う 。

`join` removes all white space and then replaces the marks. So a tokenizer may put spaces anywhere: only a
character outside its vocabulary is lost. A segmenter only decides where words end; the characters are always
those of the text.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import re
import shlex
import shutil
import subprocess
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipe.config.tokenizer import SEGMENTERS
from recipe.corpus.packages import download_packages
from recipe.project import RecipeError, Refused, fsync_tree, nearest, require_extra

MARKS = {" ": "▁", "\t": "␉", "\n": "␊"}
ESCAPE = "␛"
# The characters that are written in another form: white space without a mark by its number (all white space
# is below U+10000), and the marks after an escape.
_FORMS = {
    **{chr(i): f"{ESCAPE}{i:04x}" for i in range(0x10000) if chr(i).isspace()},
    **MARKS,
    **{mark: ESCAPE + mark for mark in (*MARKS.values(), ESCAPE)},
}
_TO_FORM = str.maketrans(_FORMS)
_FROM_FORM = {form: character for character, form in _FORMS.items()}
# No form begins with another one.
_FORM = re.compile("|".join(_FROM_FORM))
_MARK = re.compile(f"[{''.join(MARKS.values())}{ESCAPE}]")
_SPACE = re.compile(r"(\s+)")
# The row of the word @ in JUMAN's format: surface, reading, base form, part of speech.
_AT_SIGN = re.compile("@ @ @ (?!@ )")

# Juman++ refuses more than 4,096 bytes at once, MeCab's program 8,192, Sudachi 49,149; a character has at
# most 4 bytes. A longer line is cut into parts, at the last 。 or space before the limit or at the limit.
LONGEST_PART = 1000
_PART = re.compile(rf".{{1,{LONGEST_PART - 1}}}[。\s]|.{{1,{LONGEST_PART}}}")
BATCH = 200_000  # characters that a worker gets at once: a fraction of a second of work
PROBE = "今日は本を読みました。"

_MECAB_PACKAGES = ["mecab", "libmecab2", "mecab-utils", "mecab-jumandic-utf8"]


def join(text: str) -> str:
    """The text from its segmented form: white space is removed, then the marks are replaced.

    Exact for every result of `Segmenter.segment`, also when a tokenizer has moved the spaces. It takes any
    text, such as the output of a model: an unknown escape stays as it is.
    """
    return _FORM.sub(lambda match: _FROM_FORM[match[0]], "".join(text.split()))


def make_segmenter(name: str, data: Path) -> Segmenter:
    """The segmenter that tokenizer.json names by ``segmenter``: jumanpp, mecab or sudachi.

    data: the project's data folder. If the system lacks MeCab or the JUMAN dictionary, both are downloaded
    into ``.tools`` there. The segmenter is tested on a sentence before it is returned. Raises Refused for an
    unknown name or a missing program, saying what to install, and RecipeError when the download fails.
    """
    if name not in SEGMENTERS:
        raise Refused(
            f"tokenizer.json: segmenter: unknown segmenter {name!r}.{nearest(name, SEGMENTERS)} "
            f"Known: {', '.join(SEGMENTERS)}"
        )
    if name == "jumanpp":
        segmenter = Segmenter(name, _jumanpp_command())
    elif name == "mecab":
        segmenter = Segmenter(name, _system_mecab() or _fetched_mecab(data / ".tools" / "mecab"))
    else:
        _sudachi()
        segmenter = Segmenter(name)
    segmenter.probe()
    return segmenter


@dataclass
class Segmenter:
    """Segments texts with one program or library; made by `make_segmenter`.

    command: the program and its arguments; empty for a library.
    counts: ``parts``, how many were segmented so far: lines that are not only white space, and a line longer
    than LONGEST_PART is several parts. ``repaired``: the segmenter changed characters one for one, such as
    wide for narrow; its word ends were used. ``left whole``: it lost or added characters, or failed; such a
    part has no word ends except its spaces. The text itself never changes.
    """

    name: str
    command: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def segment(self, texts: list[str]) -> list[str]:
        """Segment each text; the result has as many lines as the text, and `join` restores the text.

        Raises RecipeError for a lone surrogate, which is not valid in UTF-8.
        """
        lines = [line for text in texts for line in text.split("\n")]
        parts = [_parts(line) for line in lines]
        answers = self._words(list(itertools.chain.from_iterable(parts)))
        written = []
        try:
            for line, cut in zip(lines, parts, strict=True):
                words = [word for part in cut for word in self._checked(part, next(answers))]
                written.append(_write(line, words))
        except UnicodeEncodeError as error:
            context = error.object[max(0, error.start - 20) : error.end + 20]
            raise RecipeError(
                f"segmenting: a lone surrogate {error.object[error.start]!a} in {context!a}. "
                "It is not valid Unicode: remove it"
            ) from error
        remaining = iter(written)
        return [_text(list(itertools.islice(remaining, text.count("\n") + 1))) for text in texts]

    def parallel(self, texts: Iterable[str], workers: int) -> Iterator[str]:
        """Like `segment`, for any number of texts, in order, in `workers` processes; memory stays bounded.

        With more than one worker, the calling script needs ``if __name__ == "__main__"``, because each
        process imports it. Raises RecipeError when a worker dies.
        """
        if workers == 1:
            for batch in _batches(texts):
                yield from self.segment(batch)
            return
        # Not forked: the caller may have threads (torch, tokenizers), which do not survive a fork.
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
        pending: deque[Future[tuple[list[str], Counter[str]]]] = deque()

        def oldest() -> list[str]:
            segmented, counts = pending.popleft().result()
            self.counts.update(counts)
            return segmented

        try:
            for batch in _batches(texts):
                pending.append(pool.submit(_segment_batch, self.name, self.command, batch))
                if len(pending) == 2 * workers:
                    yield from oldest()
            while pending:
                yield from oldest()
        except BrokenProcessPool as error:
            raise RecipeError(
                f"segmenting: a worker of {self.name} was killed, perhaps for lack of memory. Free memory, "
                "or use a machine with more of it"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)

    def probe(self) -> None:
        """Raise RecipeError unless the segmenter finds words in a sentence."""
        answers = self._answers([PROBE])
        if len(answers) == 1 and len(answers[0]) > 1 and "".join(answers[0]) == PROBE:
            return
        if not self.command:
            raise RecipeError(f"{self.name} finds no words in {PROBE!r}, answer {answers}. Install it again")
        result = _ask(self.command, PROBE)
        tail = " ".join(result.stderr.decode("utf-8", "replace").split())[-300:]
        raise RecipeError(
            f"`{shlex.join(self.command)}` finds no words in {PROBE!r}: exit {result.returncode}, answer "
            f"{result.stdout.decode('utf-8', 'replace')[:100]!r}, message {tail!r}. Install it again, "
            "with its dictionary or model in UTF-8"
        )

    def _words(self, parts: list[str]) -> Iterator[list[str]]:
        """The words of each part; none for a part on which the segmenter fails."""
        for batch in _batches(parts):
            answers = self._answers(batch)
            if len(answers) == len(batch):
                yield from answers
            elif len(batch) > 1:
                # It failed on one of them: halving finds it.
                middle = len(batch) // 2
                yield from self._words(batch[:middle])
                yield from self._words(batch[middle:])
            else:
                # Does it fail on this part only, or on everything?
                self.probe()
                yield []

    def _answers(self, parts: list[str]) -> list[list[str]]:
        """The segmenter's answers: words without white space, a list for each part that it could segment."""
        if self.name == "sudachi":
            # The list as text has spaces between its words. A word may be a space itself, or contain one.
            return [str(_sudachi().tokenize(part)).split() for part in parts]
        text = "\n".join(parts)
        if self.name == "jumanpp":
            # A line that begins with "# " would be a comment. U+3000 is JUMAN's own space.
            return _parse_juman(_ask(self.command, text.replace(" ", "\u3000")).stdout)
        return [row.split() for row in _rows(_ask(self.command, text).stdout)]

    def _checked(self, part: str, words: list[str]) -> list[str]:
        """The words if together they are as long as the part; otherwise the whole part as one word."""
        whole, answer = part.replace(" ", ""), "".join(words)
        self.counts["parts"] += 1
        if answer == whole:
            return words
        if len(answer) == len(whole):
            self.counts["repaired"] += 1
            return words
        self.counts["left whole"] += 1
        return [whole]


def _segment_batch(name: str, command: list[str], texts: list[str]) -> tuple[list[str], Counter[str]]:
    """The task of a worker process: the segmented texts and their counts."""
    segmenter = Segmenter(name, command)
    return segmenter.segment(texts), segmenter.counts


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts in lists of about BATCH characters."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text) + 1
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _parts(line: str) -> list[str]:
    """A line as the segmenters read it: a single ASCII space for white space, cut when it is too long."""
    folded = " ".join(line.split())
    if len(folded) <= LONGEST_PART:
        return [folded] if folded else []
    return [part.strip() for part in _PART.findall(folded) if part.strip()]


def _write(line: str, words: list[str]) -> str:
    """The segmented form of a line; only the lengths of the words are used, the characters are the line's."""
    has_marks = _MARK.search(line)
    chunks = _SPACE.split(line)
    if len(chunks) == 1 and not has_marks and "".join(words) == line:
        return " ".join(words)
    written: list[str] = []
    lengths = map(len, words)
    left = 0  # characters of the current word that are still missing: it may continue after a space
    for chunk in filter(None, chunks):
        if chunk.isspace():
            written.append(chunk.translate(_TO_FORM))
            continue
        begin = 0
        while begin < len(chunk):
            left = left or next(lengths)
            word = chunk[begin : begin + left]
            written.append(word.translate(_TO_FORM) if has_marks else word)
            begin += len(word)
            left -= len(word)
    return " ".join(written)


def _text(lines: list[str]) -> str:
    """Segmented lines as one text, each line end marked."""
    mark = MARKS["\n"]
    return "\n".join([*(f"{line} {mark}".lstrip() for line in lines[:-1]), lines[-1]])


# ---------------------------------------------------------------------------------------- programs


def _ask(command: list[str], text: str) -> subprocess.CompletedProcess[bytes]:
    """Run a segmenter on lines. Its exit code is ignored: that of Juman++ is for the last line only."""
    return subprocess.run(command, input=text.encode("utf-8"), capture_output=True)


def _rows(output: bytes) -> list[str]:
    """The lines of a program's answer."""
    return output.decode("utf-8", "replace").removesuffix("\n").split("\n")


def _parse_juman(output: bytes) -> list[list[str]]:
    """The words of each line from JUMAN's format: one row per word, surface first, and EOS after each line.

    A row that begins with ``@`` is another reading of the word before it, unless the word is an @ itself.
    ``# ERROR`` marks a line that could not be analysed; it has no words.
    """
    answers: list[list[str]] = []
    words: list[str] = []
    for row in _rows(output):
        if row == "EOS":
            # Split again, because a word may be JUMAN's space.
            answers.append(" ".join(words).split())
            words = []
        elif row != "# ERROR" and (not row.startswith("@ ") or _AT_SIGN.match(row)):
            words.append(row.split(" ", 1)[0])
    return answers


def require_segmenter(name: str | None) -> None:
    """Raise Refused unless a segmenter is there or can be fetched. None: none is needed."""
    if name == "jumanpp":
        _jumanpp_command()
    elif name == "sudachi":
        require_extra("sudachi", 'tokenizer.json: segmenter: "sudachi"')
    elif name == "mecab" and not _system_mecab():
        _require_apt()


def _jumanpp_command() -> list[str]:
    program = shutil.which("jumanpp")
    if not program:
        raise Refused(
            'tokenizer.json: segmenter: "jumanpp": `jumanpp` is not on PATH. Build a release of Juman++ 2 '
            "(github.com/ku-nlp/jumanpp, the package of about 300 MB that contains the model), or use "
            "another segmenter: mecab has the same standard of words, sudachi is installed by "
            "`bash setup.sh --extra sudachi`"
        )
    return [program, "--juman"]


def _system_mecab() -> list[str] | None:
    """The command of this system's MeCab with its JUMAN dictionary in UTF-8, or None."""
    program = shutil.which("mecab")
    if not program:
        return None
    default = _dictionary([program])
    for folder in sorted(Path(default.get("filename", "/none/none")).parent.parent.glob("juman*")):
        command = [program, "-r", os.devnull, "-d", str(folder), "-O", "wakati"]
        if _dictionary(command).get("charset", "").lower().replace("-", "") == "utf8":
            return command
    return None


def _dictionary(command: list[str]) -> dict[str, str]:
    """What `mecab -D` prints about its dictionary: filename, charset and more; empty without a dictionary."""
    rows = _rows(subprocess.run([*command, "-D"], capture_output=True).stdout)
    return dict(row.split(":\t", 1) for row in rows if ":\t" in row)


def _fetched_mecab(folder: Path) -> list[str]:
    """The command of MeCab from Debian's packages, unpacked once into `folder` with its JUMAN dictionary."""
    if not folder.is_dir():
        _require_apt()
        part = folder.with_name(f".{folder.name}.{os.getpid()}")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            _build_mecab(part, folder.parents[1])
            part.rename(folder)
        except OSError:
            # If the folder exists now, another process was faster; its copy is the same.
            if not folder.is_dir():
                raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
    dictionary = str((folder / "dic").resolve())
    return [*_with_library(folder, "bin/mecab"), "-r", os.devnull, "-d", dictionary, "-O", "wakati"]


def _require_apt() -> None:
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise Refused(
            'tokenizer.json: segmenter: "mecab": `mecab` with a JUMAN dictionary is not on PATH, and '
            "apt-get and dpkg-deb, which could download it, are missing. Install MeCab and its JUMAN "
            "dictionary in UTF-8 (Debian: mecab, mecab-jumandic-utf8; Homebrew: mecab, mecab-jumandic), "
            "or use the segmenter sudachi"
        )


def _build_mecab(part: Path, data: Path) -> None:
    """Download, unpack and compile into the empty folder `part`; raises RecipeError."""
    try:
        download_packages("mecab", _MECAB_PACKAGES, part, data)
    except RecipeError as error:
        # The last line is advice for a source of text.
        what = "\n".join(str(error).splitlines()[:-1])
        raise RecipeError(
            f"tokenizer.json: segmenter: the download of mecab failed: {what}\nCheck the network and run "
            "again, install mecab and mecab-jumandic-utf8, or use the segmenter sudachi"
        ) from error
    for package in sorted(part.glob("*.deb")):
        _check(["dpkg-deb", "-x", str(package), str(part)])
        package.unlink()
    # The package contains the sources of the dictionary. Its installation would compile them in this way.
    sources, compiled = part / "usr/share/mecab/dic/juman", part / "dic"
    compiled.mkdir()
    index = _with_library(part, "lib/mecab/mecab-dict-index")
    _check([*index, "-d", str(sources), "-o", str(compiled), "-f", "utf-8", "-t", "utf-8"])
    shutil.copy(sources / "dicrc", compiled)
    shutil.rmtree(part / "usr/share/mecab")
    fsync_tree(part)


def _with_library(folder: Path, program: str) -> list[str]:
    """The command for a program of the unpacked packages, with the path of its libmecab."""
    (library,) = folder.glob("usr/lib/*/libmecab.so.2")
    return ["env", f"LD_LIBRARY_PATH={library.parent.resolve()}", str((folder / "usr" / program).resolve())]


def _check(command: list[str]) -> None:
    """Run a command; raise RecipeError when it fails."""
    result = subprocess.run(command, capture_output=True)
    if result.returncode:
        tail = result.stderr.decode("utf-8", "replace").strip()[-300:]
        raise RecipeError(f"`{shlex.join(command)}` failed with exit {result.returncode}: {tail}")


@functools.cache
def _sudachi() -> Any:
    """Sudachi with its core dictionary, loaded once per process."""
    require_extra("sudachi", 'tokenizer.json: segmenter: "sudachi"')
    import sudachipy

    dictionary = sudachipy.Dictionary(dict="core")
    # The shortest of its three word units is the nearest to that of JUMAN (tests/bench/segmentation.py).
    return dictionary.tokenizer(mode=sudachipy.SplitMode.A)
