"""Words apart: Japanese text segmented by Juman++, MeCab or Sudachi, in a form that joins back exactly.

The form that reaches a tokenizer:

- words stand between single spaces; every plain space is such a separator and nothing else;
- white space of the original is written with a visible mark, as a word of its own: ``▁`` (U+2581) is a space,
  ``␉`` (U+2409) a tab, ``␊`` (U+240A) a line end, and ``␛`` (U+241B) with four hex digits any other, so
  U+3000 is ``␛3000``; the line end itself also stays, after its mark, so line N of a text is line N of its
  segmentation;
- a mark that is itself part of a text gets ``␛`` in front: ``▁`` becomes ``␛▁``.

    私はLinux 6.1を使う。   ->   私 は Linux ▁ 6 . 1 を 使う 。

`join` takes all white space away and then reads the marks. So it does not matter where a tokenizer puts
spaces of its own, between words, inside them, or nowhere: only a character outside its vocabulary is lost.
A segmenter only says where words end; the characters of a segmentation are always those of the input.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import multiprocessing
import os
import re
import shlex
import shutil
import subprocess
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipe.config.tokenizer import SEGMENTERS
from recipe.corpus.packages import download_packages
from recipe.project import RecipeError, Refused, fsync_tree, require_extra

MARKS = {" ": "▁", "\t": "␉", "\n": "␊"}
ESCAPE = "␛"
# How characters are written that cannot stand for themselves: white space without a mark by its number (all
# of it lies below U+10000), the marks behind an escape.
_FORMS = {
    **{chr(i): f"{ESCAPE}{i:04x}" for i in range(0x10000) if chr(i).isspace()},
    **MARKS,
    **{mark: ESCAPE + mark for mark in (*MARKS.values(), ESCAPE)},
}
_TO_FORM = str.maketrans(_FORMS)
_FROM_FORM = {form: character for character, form in _FORMS.items()}
_FORM = re.compile("|".join(_FROM_FORM))  # none begins another
_MARK = re.compile(f"[{''.join(MARKS.values())}{ESCAPE}]")
_SPACE = re.compile(r"(\s+)")
_AT_SIGN = re.compile("@ @ @ (?!@ )")  # the row of the word @: surface, reading, base form, part of speech

# Juman++ refuses more than 4,096 bytes at once, MeCab's program 8,192, Sudachi 49,149; a character has at
# most 4 bytes. Longer lines are cut at the last 。 or space before that, or else there.
LONGEST_PIECE = 1000
_PIECE = re.compile(rf".{{1,{LONGEST_PIECE - 1}}}[。\s]|.{{1,{LONGEST_PIECE}}}")
BATCH = 200_000  # characters that a worker gets at a time, a fraction of a second of work
PROBE = "今日は本を読みました。"

_MECAB_PACKAGES = ["mecab", "libmecab2", "mecab-utils", "mecab-jumandic-utf8"]


def join(text: str) -> str:
    """The text that was segmented: all white space away, then the marks read.

    Exact for whatever `Segmenter.segment` made, also when a tokenizer has moved the spaces. Takes any text,
    such as a model makes: an escape that leads nowhere stays as it is.
    """
    return _FORM.sub(lambda match: _FROM_FORM[match[0]], "".join(text.split()))


def make_segmenter(name: str | None, data: Path) -> Segmenter | None:
    """The segmenter that tokenizer.json names by ``segmenter``: jumanpp, mecab or sudachi; None for None.

    data: the project's data folder. MeCab and the JUMAN dictionary are fetched into ``.tools`` there when
    this system has not got both. The segmenter is tried on a sentence before it is returned.
    Raises Refused for an unknown name or a missing program, saying what to install, and RecipeError when
    fetching fails.
    """
    if name is None:
        return None
    if name not in SEGMENTERS:
        close = difflib.get_close_matches(str(name), SEGMENTERS, 1, 0.6)
        raise Refused(
            f"tokenizer.json: segmenter: unknown segmenter {name!r}."
            + (f" Did you mean {close[0]!r}?" if close else "")
            + f" Known: {', '.join(SEGMENTERS)}"
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
    counts: what became of the ``pieces`` so far (the lines with more than white space in them; one that is
    longer than LONGEST_PIECE is several). ``repaired``: the segmenter answered with other characters, one for
    one (as wide for narrow); its word ends were used. ``left whole``: it lost or added characters, or failed;
    the piece has no word ends but its spaces. In neither case is the text itself touched.
    """

    name: str
    command: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    join = staticmethod(join)

    def segment(self, texts: list[str]) -> list[str]:
        """Segment each text; the result has as many lines as the text, and `join` gives the text back.

        Raises RecipeError for half of a surrogate pair, which UTF-8 cannot hold.
        """
        lines = [line for text in texts for line in text.split("\n")]
        pieces = [_pieces(line) for line in lines]
        answers = self._words(list(itertools.chain.from_iterable(pieces)))
        written = []
        try:
            for line, cut in zip(lines, pieces, strict=True):
                words = [word for piece in cut for word in self._checked(piece, next(answers))]
                written.append(_write(line, words))
        except UnicodeEncodeError as error:
            context = error.object[max(0, error.start - 20) : error.end + 20]
            raise RecipeError(
                f"segmenting: half of a surrogate pair, {error.object[error.start]!a}, in {context!a}. "
                "It is not text: remove it"
            ) from error
        remaining = iter(written)
        return [_text(list(itertools.islice(remaining, text.count("\n") + 1))) for text in texts]

    def parallel(self, texts: Iterable[str], workers: int) -> Iterator[str]:
        """Like `segment`, for any number of texts, in order, over `workers` processes; memory stays bounded.

        With more than one, the calling script needs its ``if __name__ == "__main__"``, since the processes
        start afresh. Raises RecipeError when one of them dies.
        """
        if workers == 1:
            for batch in _batches(texts):
                yield from self.segment(batch)
            return
        # Not forked: the caller may have threads (torch, tokenizers), which a fork would leave half alive.
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
                f"segmenting: a worker of {self.name} was killed, out of memory perhaps. Use fewer workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)

    def round_trip(
        self, texts: list[str], through: Callable[[str], str] = lambda segmented: segmented
    ) -> dict[str, Any]:
        """Figures on how many texts come back exactly, with the first that does not.

        through: what happens to a segmented text on its way, such as a tokenizer's encode and decode.
        Returns ``texts``, ``exact``, ``exact_share`` and ``first_loss`` ({"text", "returned"} or None).
        """
        returned = [join(through(segmented)) for segmented in self.segment(texts)]
        losses = [(a, b) for a, b in zip(texts, returned, strict=True) if a != b]
        exact = len(texts) - len(losses)
        return {
            "texts": len(texts),
            "exact": exact,
            "exact_share": exact / max(1, len(texts)),
            "first_loss": {"text": losses[0][0], "returned": losses[0][1]} if losses else None,
        }

    def probe(self) -> None:
        """Raise RecipeError unless the segmenter finds words in a sentence."""
        answers = self._answers([PROBE])
        if len(answers) == 1 and len(answers[0]) > 1 and "".join(answers[0]) == PROBE:
            return
        if not self.command:
            raise RecipeError(f"{self.name} finds no words in {PROBE!r} but {answers}. Install it again")
        result = _ask(self.command, PROBE)
        tail = " ".join(result.stderr.decode("utf-8", "replace").split())[-300:]
        raise RecipeError(
            f"`{shlex.join(self.command)}` finds no words in {PROBE!r}: exit {result.returncode}, answer "
            f"{result.stdout.decode('utf-8', 'replace')[:100]!r}, message {tail!r}. Are its program and its "
            "dictionary or model whole, and in UTF-8?"
        )

    def _words(self, pieces: list[str]) -> Iterator[list[str]]:
        """The words of each piece, none for one that the segmenter fails on."""
        for batch in _batches(pieces):
            answers = self._answers(batch)
            if len(answers) == len(batch):
                yield from answers
            elif len(batch) > 1:  # it failed on one of them, which is found by halving
                middle = len(batch) // 2
                yield from self._words(batch[:middle])
                yield from self._words(batch[middle:])
            else:
                self.probe()  # is it this piece, or does nothing work any more?
                yield []

    def _answers(self, pieces: list[str]) -> list[list[str]]:
        """What the segmenter answers: words without white space, a list for each piece it did not fail on."""
        if self.name == "sudachi":
            # The list as text is its words between spaces; a word may be a space itself or hold one.
            return [str(_sudachi().tokenize(piece)).split() for piece in pieces]
        text = "\n".join(pieces)
        if self.name == "jumanpp":
            # With ASCII spaces, a line that begins with "# " would be a comment. This is JUMAN's own space.
            return _parse_juman(_ask(self.command, text.replace(" ", "\u3000")).stdout)
        return [row.split() for row in _rows(_ask(self.command, text).stdout)]

    def _checked(self, piece: str, words: list[str]) -> list[str]:
        """The words if they are of the same length as the piece, else the piece as one; counted."""
        solid, answer = piece.replace(" ", ""), "".join(words)
        self.counts["pieces"] += 1
        if answer == solid:
            return words
        if len(answer) == len(solid):
            self.counts["repaired"] += 1
            return words
        self.counts["left whole"] += 1
        return [solid]


def _segment_batch(name: str, command: list[str], texts: list[str]) -> tuple[list[str], Counter[str]]:
    """What a worker process runs: the segmented texts and their counts."""
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


def _pieces(line: str) -> list[str]:
    """A line as segmenters get it: single ASCII spaces for white space, cut when it is too long."""
    folded = " ".join(line.split())
    if len(folded) <= LONGEST_PIECE:
        return [folded] if folded else []
    return [piece.strip() for piece in _PIECE.findall(folded) if piece.strip()]


def _write(line: str, words: list[str]) -> str:
    """The segmented form of a line. Only the lengths of the words are used: the characters are the line's."""
    has_marks = _MARK.search(line)
    chunks = _SPACE.split(line)
    if len(chunks) == 1 and not has_marks and "".join(words) == line:
        return " ".join(words)
    written: list[str] = []
    lengths = map(len, words)
    left = 0  # characters of the present word that are still to come: it may go on after a space
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
    """Run a segmenter over lines. Its exit code is not asked: that of Juman++ is about the last line only."""
    return subprocess.run(command, input=text.encode("utf-8"), capture_output=True)


def _rows(output: bytes) -> list[str]:
    """The lines of a program's answer."""
    return output.decode("utf-8", "replace").removesuffix("\n").split("\n")


def _parse_juman(output: bytes) -> list[list[str]]:
    """The words of each line from JUMAN's format: a row a word, surface first, and EOS after each line.

    Rows that begin with ``@`` are other readings of the word before them, unless the word is an @ itself.
    ``# ERROR`` stands for a line that could not be analysed: it has no words.
    """
    answers: list[list[str]] = []
    words: list[str] = []
    for row in _rows(output):
        if row == "EOS":
            # Split again: the word may be JUMAN's space.
            answers.append(" ".join(words).split())
            words = []
        elif row != "# ERROR" and (not row.startswith("@ ") or _AT_SIGN.match(row)):
            words.append(row.split(" ", 1)[0])
    return answers


def _jumanpp_command() -> list[str]:
    program = shutil.which("jumanpp")
    if not program:
        raise Refused(
            "tokenizer.json: segmenter: there is no `jumanpp` on PATH. Build a release of Juman++ 2 "
            "(github.com/ku-nlp/jumanpp, the package of about 300 MB that holds the model), or take another "
            "segmenter: mecab follows the same standard of words, sudachi comes with pip"
        )
    return [program, "--juman"]


def _system_mecab() -> list[str] | None:
    """This system's MeCab with its JUMAN dictionary in UTF-8, if it has both."""
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
    """What `mecab -D` says of the dictionary in use: filename, charset and more; empty when there is none."""
    rows = _rows(subprocess.run([*command, "-D"], capture_output=True).stdout)
    return dict(row.split(":\t", 1) for row in rows if ":\t" in row)


def _fetched_mecab(folder: Path) -> list[str]:
    """MeCab and the JUMAN dictionary from Debian's packages, unpacked and compiled into `folder` once."""
    if not folder.is_dir():
        if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
            raise Refused(
                "tokenizer.json: segmenter: no `mecab` with a JUMAN dictionary is on PATH, and no apt-get "
                "and dpkg-deb to fetch them. Install MeCab and its JUMAN dictionary in UTF-8 (Debian: mecab, "
                "mecab-jumandic-utf8; Homebrew: mecab, mecab-jumandic), or take the segmenter sudachi"
            )
        part = folder.with_name(f".{folder.name}.{os.getpid()}")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            _build_mecab(part, folder.parents[1])
            part.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was quicker, and its copy is as good
                raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
    dictionary = str((folder / "dic").resolve())
    return [*_with_library(folder, "bin/mecab"), "-r", os.devnull, "-d", dictionary, "-O", "wakati"]


def _build_mecab(part: Path, data: Path) -> None:
    """Fetch, unpack and compile into an empty folder. Raises RecipeError."""
    try:
        download_packages("mecab", _MECAB_PACKAGES, part, data)
    except RecipeError as error:
        what = "\n".join(str(error).splitlines()[:-1])  # the last line is advice for a source of text
        raise RecipeError(
            f"tokenizer.json: segmenter: fetching mecab failed: {what}\nCheck the network and run again, "
            "install mecab and mecab-jumandic-utf8, or take the segmenter sudachi"
        ) from error
    for package in sorted(part.glob("*.deb")):
        _check(["dpkg-deb", "-x", str(package), str(part)])
        package.unlink()
    # The package holds the sources of the dictionary; installing it would compile them like this.
    sources, compiled = part / "usr/share/mecab/dic/juman", part / "dic"
    compiled.mkdir()
    index = _with_library(part, "lib/mecab/mecab-dict-index")
    _check([*index, "-d", str(sources), "-o", str(compiled), "-f", "utf-8", "-t", "utf-8"])
    shutil.copy(sources / "dicrc", compiled)
    shutil.rmtree(part / "usr/share/mecab")
    fsync_tree(part)


def _with_library(folder: Path, program: str) -> list[str]:
    """The command for a program of the unpacked packages, which finds libmecab beside it."""
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
    """Sudachi with its core dictionary, one for each process."""
    require_extra("sudachi", 'tokenizer.json: segmenter: "sudachi"')
    import sudachipy

    dictionary = sudachipy.Dictionary(dict="core")
    # The shortest of its three units of words is the nearest to JUMAN's (tests/bench/segmentation.py).
    return dictionary.tokenizer(mode=sudachipy.SplitMode.A)
