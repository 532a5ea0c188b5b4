"""What stage 02 kept and dropped of each source: counts, samples, a table and a picture."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipe.project import markdown_table

SAMPLES = 5  # dropped documents shown per source and reason
SAMPLE_CHARACTERS = 300
TEMPLATES = 1000  # that a shard hands on, and a source remembers: the most frequent ones
TEMPLATES_SHOWN = 30


@dataclass
class Funnel:
    """Documents and UTF-8 bytes of one source, or of one shard of it.

    documents in = out + sum(dropped) and bytes in = out + sum(dropped) + trimmed are exact; `trimmed` is what
    extraction and normalising removed from kept documents. `extraction` has the counts of the source's
    extractor and of the normaliser, such as the readings removed from Aozora Bunko's works. `capped` names
    the limit at which reading ended. `samples` has, for each reason, a few of the dropped documents: those
    with the smallest hash of their name, so that the choice does not depend on the shards.

    `templates` has the templates of Wikipedia that showed nothing because they are not known: uses, uses in a
    line of text, and an example of each. Only the TEMPLATES most frequent ones of each shard and of the
    source are kept, so that memory does not grow with the dump; the counts of rare ones can be too low.
    """

    documents_in: int = 0
    documents_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    bytes_trimmed: int = 0
    lines_in: int = 0
    lines_out: int = 0
    documents_dropped: Counter[str] = field(default_factory=Counter)
    bytes_dropped: Counter[str] = field(default_factory=Counter)
    extraction: Counter[str] = field(default_factory=Counter)
    capped: str = ""
    samples: dict[str, list[list[str]]] = field(default_factory=dict)
    templates: dict[str, list[Any]] = field(default_factory=dict)

    def drop(self, reason: str, size: int, name: str, text: str) -> None:
        """Count a document of `size` bytes as dropped."""
        self.documents_dropped[reason] += 1
        self.bytes_dropped[reason] += size
        self._sample(
            reason,
            [hashlib.blake2b(name.encode(), digest_size=8).hexdigest(), name, text[:SAMPLE_CHARACTERS]],
        )

    def _sample(self, reason: str, *samples: list[str]) -> None:
        self.samples[reason] = sorted([*self.samples.get(reason, []), *samples])[:SAMPLES]

    def close_templates(self) -> None:
        """Count the uses of all templates of a shard, and keep the most frequent templates."""
        if self.templates:
            self.extraction["unknown templates"] += sum(uses for uses, _, _ in self.templates.values())
        self._keep_frequent_templates()

    def _keep_frequent_templates(self) -> None:
        order = sorted(self.templates.items(), key=lambda item: (-item[1][1], -item[1][0], item[0]))
        self.templates = dict(order[:TEMPLATES])

    def add(self, other: Funnel) -> None:
        """Add the counts and samples of another part of the same source."""
        for name in (
            "documents_in",
            "documents_out",
            "bytes_in",
            "bytes_out",
            "bytes_trimmed",
            "lines_in",
            "lines_out",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.documents_dropped += other.documents_dropped
        self.bytes_dropped += other.bytes_dropped
        self.extraction += other.extraction
        for reason, samples in other.samples.items():
            self._sample(reason, *samples)
        for name, (uses, in_a_line, example) in other.templates.items():
            mine = self.templates.setdefault(name, [0, 0, ""])
            if not mine[0] or (in_a_line and not mine[1]):
                mine[2] = example
            mine[0] += uses
            mine[1] += in_a_line
        self._keep_frequent_templates()

    def check(self, source: str) -> None:
        """Raise AssertionError unless every document and byte is counted."""
        documents = self.documents_out + sum(self.documents_dropped.values())
        size = self.bytes_out + sum(self.bytes_dropped.values()) + self.bytes_trimmed
        assert (documents, size) == (self.documents_in, self.bytes_in), (
            f"{source}: the funnel does not sum up: {self}"
        )

    def as_json(self) -> dict[str, Any]:
        """Its form in ``funnel.json``."""
        return {
            "documents": {
                "in": self.documents_in,
                "out": self.documents_out,
                "dropped": dict(self.documents_dropped),
            },
            "bytes": {
                "in": self.bytes_in,
                "out": self.bytes_out,
                "dropped": dict(self.bytes_dropped),
                "trimmed": self.bytes_trimmed,
            },
            "lines_of_kept_documents": {"in": self.lines_in, "out": self.lines_out},
            "extraction": dict(self.extraction),
            "capped": self.capped,
        }


def to_record(funnel: Funnel) -> dict[str, Any]:
    """A funnel as plain JSON, samples included."""
    return dict(vars(funnel))


def from_record(record: dict[str, Any]) -> Funnel:
    """The inverse of `to_record`."""
    counters = {key: Counter(record[key]) for key in ("documents_dropped", "bytes_dropped", "extraction")}
    return Funnel(**(record | counters))


def _reasons(funnels: dict[str, Funnel]) -> list[str]:
    """All reasons, the one with the most bytes first; an empty document has none."""
    names = {reason for funnel in funnels.values() for reason in funnel.documents_dropped}
    size = {reason: sum(funnel.bytes_dropped[reason] for funnel in funnels.values()) for reason in names}
    return sorted(names, key=lambda reason: (-size[reason], reason))


def funnel_table(funnels: dict[str, Funnel]) -> str:
    """The funnel as a Markdown table, and samples of dropped documents, which show a bad rule."""
    reasons = _reasons(funnels)
    head = [
        "source",
        "documents in",
        *(f"dropped: {reason}" for reason in reasons),
        "kept",
        "MB in",
        "MB trimmed",
        "MB kept",
    ]
    rows = []
    for name, f in funnels.items():
        counts = [f.documents_in, *(f.documents_dropped[reason] for reason in reasons), f.documents_out]
        sizes = [f.bytes_in, f.bytes_trimmed, f.bytes_out]
        rows.append([name, *(f"{count:,}" for count in counts), *(f"{size / 1e6:.2f}" for size in sizes)])
    lines = markdown_table(head, rows)
    cut = [f"{name} ends at its limit {funnel.capped}." for name, funnel in funnels.items() if funnel.capped]
    lines += ["", *cut] if cut else []
    for name, funnel in funnels.items():
        counts = ", ".join(f"{figure} {count:,}" for figure, count in funnel.extraction.items() if count)
        lines += ["", f"Found in {name}: {counts}."] if counts else []
    for name, funnel in funnels.items():
        lines += _template_lines(name, funnel)
    for name, funnel in funnels.items():
        for reason in sorted(funnel.samples):
            lines += ["", f"### {name}: {reason} ({funnel.documents_dropped[reason]:,} documents)", ""]
            for _, document, text in funnel.samples[reason]:
                lines.append(f"- {_code(document)}: {_code(text)}")
    return "\n".join(lines) + "\n"


def _template_lines(source: str, funnel: Funnel) -> list[str]:
    """The most frequent templates that showed nothing, as a table."""
    if not funnel.templates:
        return []
    rows = [
        [_code(name), f"{uses:,}", f"{in_a_line:,}", _code(example).replace("|", "\\|")]
        for name, (uses, in_a_line, example) in list(funnel.templates.items())[:TEMPLATES_SHOWN]
    ]
    return [
        "",
        f"### {source}: templates that are not known and showed nothing",
        "",
        f"The {TEMPLATES_SHOWN} most frequent ones; first those in a line of text, where they leave a hole. "
        f"`templates` of sources.{source} in dataset.json says how to read one.",
        "",
        *markdown_table(("template", "uses", "in a line of text", "example"), rows, "lrrl"),
    ]


def _code(text: str) -> str:
    """A text on one line as a code span of Markdown."""
    shown = " ".join(text.split()).replace("`", "'")
    return f"`{shown or '(nothing)'}`"


def picture(funnels: dict[str, Funnel], path: Path) -> None:
    """A bar for each source: the shares of its bytes that were kept, trimmed, and dropped by each reason."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.6 + 0.5 * len(funnels)), layout="constrained")
    axes = figure.subplots()
    names = [f"{name}\n{funnel.bytes_in / 1e6:,.1f} MB" for name, funnel in funnels.items()]
    parts = {
        "kept": [f.bytes_out for f in funnels.values()],
        "trimmed": [f.bytes_trimmed for f in funnels.values()],
    }
    parts |= {reason: [f.bytes_dropped[reason] for f in funnels.values()] for reason in _reasons(funnels)}
    left = [0.0] * len(funnels)
    colours = ["#2a7f62", "#b9d8c8", *colormaps["tab20"].colors]
    for number, (part, sizes) in enumerate(parts.items()):
        shares = [
            100 * max(0, size) / max(1, f.bytes_in) for size, f in zip(sizes, funnels.values(), strict=True)
        ]
        axes.barh(names, shares, left=left, label=part, color=colours[number % len(colours)])
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of the bytes read")
    axes.set_title("What became of the text")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    figure.savefig(path, dpi=120)
