"""The prose in the wikitext of an article of Japanese Wikipedia.

`extract` turns one page into prose:

- A paragraph, a heading, a list item and a line of a poem become one line each. Lines of the source that
  MediaWiki shows as one paragraph are joined. A heading without text under it is removed.
- Removed: comments, references, tables, galleries, blocks of code, files with their captions, categories,
  interlanguage links, magic words, and every template that is not in the tables below. `Templates` adds a
  table of the user's own and the redirects of a dump, and counts the templates that it does not know.
- Readings follow their base in parentheses, as in articles: 紫陽花（あじさい）. This applies to
  ``{{読み仮名}}``, ``{{ruby}}``, ``{{ルビ}}``, ``{{ふりがな}}`` and ``<ruby>``.
- A formula stays as its TeX source. A superscript number becomes Unicode (10¹²), a subscript plain (H2O).
- The sections in `CUT` are removed; if one is of the second level, so is the rest of the page.
- Parentheses that became empty are removed: 灯台（{{Coord|…}}） becomes 灯台.

Markup that contains no other markup is resolved by regular expressions, from the inside out, which is fast.
mwparserfromhell parses what remains: brackets within brackets, and unbalanced markup.

Not handled:

- Templates that compute (``#if``, ``#expr``, 年齢, 和暦), or have prose in other parameters than listed, are
  removed, with the part of a sentence that they show. ``convert`` and ``cvt`` show only their first quantity
  or range, a quotation is shown without its source, and a hatnote (``{{main}}``) is removed.
- A redirect of a template that points to another redirect, as in MediaWiki.
- A link label with a single bracket in it, ``[[川|北川]がある]]``, keeps that bracket, as in MediaWiki.
- After an unclosed ``{{`` or an unclosed ``<ref>``, the rest of the line is lost.
- A tag with an unknown name is removed, and its content kept. Language conversion ``-{ }-`` is not changed.
"""

from __future__ import annotations

import contextlib
import html
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import mwparserfromhell
from mwparserfromhell.nodes import Heading, Template, Wikilink
from mwparserfromhell.wikicode import Wikicode

# ------------------------------------------------------------------------------------------------- data

# Sections without prose: LLM-jp cuts at those from 脚注 to 参考文献; the rest are other names in use.
CUT = ("脚注", "関連項目", "出典", "参照", "外部リンク", "参考文献", "脚註", "注釈", "註釈", "注", "関連文献")

# What a template shows: {2} is its second parameter, {label|1} `label` or else the first. Names are in lower
# case, with _ for a space. A template that is not in these tables shows nothing, and is counted.
TEMPLATES = {
    name.replace("_", " "): form
    for form, names in {
        "{1}": "nowrap nobr small smaller big large larger strong em kbd code tt mono var mvar math unicode "
        "ipa "
        "sup sub underline 下線 取消線 傍点 縦中横 abbr tooltip visible_anchor vanc flag flagcountry "
        "要出典範囲 要検証範囲 要説明範囲 補助漢字フォント 拡張漢字 jis90フォント jis2004フォント "
        "cp932フォント railgauge center",
        "{2}": "lang ラテン翻字 color fontcolor fontsize audio",
        "{label|1}": "仮リンク ill ill2 link-en 日本語版にない記事リンク",
        "{2|1}": "by columns-list",
        "{3|2}": "transl",
        "[{1}]": "ipa-all ipa-ar ipa-de ipa-en ipa-es ipa-fr ipa-it ipa-ja ipa-ko ipa-pt ipa-ru ipa-zh",
        "{1}（{2}、{3}）": "読み仮名 読み仮名_ruby不使用",
        "{1}（{2}）": "ruby ルビ ふりがな",
        "\n\n{1}\n\n": "quotation quote blockquote cquote squote",
        # Notes, and marks of what is doubtful: no part of a sentence.
        "": "sfn sfnp sfnm efn efn2 refn refnest r rp main see_also anchor anchors reflist nowrap_begin "
        "nowrap_end ntsh clear - 要出典 要検証 要説明 要ページ番号 要追加記述 誰 いつ どこ 誰によって",
    }.items()
    for name in names.split()
} | {
    "!": "&#124;",
    "=": "&#61;",
    "'": "&#39;",
    "nbsp": " ",
    "snd": " – ",
    "ndash": "–",
    "mdash": "—",
    "・": "・",
    "℃": "℃",
    "%": "%",
}

# {{lang-en|…}} shows 英語: …, {{lang-en-short|…}} 英: ….
LANGUAGE_NAMES = {
    "ar": ("アラビア語", "アラビア"),
    "cs": ("チェコ語", "チェコ"),
    "de": ("ドイツ語", "独"),
    "el": ("ギリシア語", "希"),
    "en": ("英語", "英"),
    "es": ("スペイン語", "西"),
    "fi": ("フィンランド語", "芬"),
    "fr": ("フランス語", "仏"),
    "grc": ("古代ギリシア語", "古希"),
    "he": ("ヘブライ語", "ヘブライ"),
    "hu": ("ハンガリー語", "洪"),
    "it": ("イタリア語", "伊"),
    "ko": ("朝鮮語", "朝"),
    "la": ("ラテン語", "羅"),
    "nl": ("オランダ語", "蘭"),
    "pl": ("ポーランド語", "波"),
    "pt": ("ポルトガル語", "葡"),
    "ru": ("ロシア語", "露"),
    "sv": ("スウェーデン語", "瑞"),
    "th": ("タイ語", "タイ"),
    "tr": ("トルコ語", "土"),
    "uk": ("ウクライナ語", "ウクライナ"),
    "vi": ("ベトナム語", "越"),
    "zh": ("中国語", "中"),
}

# {{JPN}} shows a flag and the name.
COUNTRIES = dict(
    jpn="日本", usa="アメリカ合衆国", gbr="イギリス", fra="フランス", deu="ドイツ", ita="イタリア",
    esp="スペイン", prt="ポルトガル", nld="オランダ", bel="ベルギー", che="スイス", aut="オーストリア",
    swe="スウェーデン", nor="ノルウェー", dnk="デンマーク", fin="フィンランド", pol="ポーランド",
    cze="チェコ", hun="ハンガリー", grc="ギリシャ", tur="トルコ", rus="ロシア", ukr="ウクライナ",
    chn="中国", kor="韓国", prk="北朝鮮", hkg="香港", ind="インド", idn="インドネシア", tha="タイ",
    vnm="ベトナム", phl="フィリピン", mys="マレーシア", sgp="シンガポール", aus="オーストラリア",
    nzl="ニュージーランド", can="カナダ", mex="メキシコ", bra="ブラジル", arg="アルゼンチン",
    chl="チリ", per="ペルー", cub="キューバ", egy="エジプト", zaf="南アフリカ共和国", isr="イスラエル",
    irn="イラン", irq="イラク", ken="ケニア",
)  # fmt: skip

# {{convert|5|km}} shows 5キロメートル, with abbr=on 5 km.
UNITS = {
    "mm": "ミリメートル", "cm": "センチメートル", "m": "メートル", "km": "キロメートル", "in": "インチ",
    "ft": "フィート", "yd": "ヤード", "mi": "マイル", "nmi": "海里", "g": "グラム", "kg": "キログラム",
    "t": "トン", "lb": "ポンド", "oz": "オンス", "m2": "平方メートル", "km2": "平方キロメートル",
    "ha": "ヘクタール", "acre": "エーカー", "sqmi": "平方マイル", "m3": "立方メートル", "l": "リットル",
    "km/h": "キロメートル毎時", "mph": "マイル毎時", "kn": "ノット", "hp": "馬力", "kw": "キロワット",
    "c": "℃",
}  # fmt: skip

# {{convert|20|-|30|m}} shows 20-30メートル: the signs between two numbers.
_RANGES = {
    "-": "-", "–": "–", "〜": "〜", "～": "〜", "~": "〜", "±": "±", "×": "×", "から": "から", "to": "から",
    "to(-)": "-", "to about": "から約", "and": "と", "and(-)": "-", "or": "または", "x": "×", "by": "×",
    "+/-": "±",
}  # fmt: skip

# Magic words that show nothing: {{DEFAULTSORT:かわ}}.
MAGIC_WORDS_OUT = ("defaultsort", "デフォルトソート", "displaytitle", "#tag")

DISAMBIGUATION = "aimai|disambig(?:uation)?|曖昧さ回避|[^{}|]*の曖昧さ回避|hndis|geodis|mathdab"
# Links with these prefixes show nothing: files, categories, and the same article in another language.
PREFIXES_OUT = re.compile(
    "file|image|media|category|ファイル|画像|メディア|カテゴリ|"
    "af|als|an|ar|arz|as|ast|az|ba|bar|be|be-x-old|bg|bn|br|bs|ca|ceb|cs|cv|cy|da|de|el|en|eo|es|et|eu|fa|fi|"
    "fo|fr|fy|ga|gl|gu|he|hi|hr|ht|hu|hy|ia|id|io|is|it|ja|jv|ka|kk|km|kn|ko|ku|ky|la|lb|li|lmo|lt|lv|mg|mk|"
    "ml|mn|mr|ms|my|nap|nds|ne|nl|nn|no|oc|os|pa|pl|pms|pnb|ps|pt|qu|ro|ru|sa|scn|sco|sh|si|simple|sk|sl|sq|"
    "sr|su|sv|sw|ta|te|tg|th|tl|tr|tt|uk|ur|uz|vec|vi|vo|wa|war|wuu|xmf|yi|yo|zh|zh-classical|zh-min-nan|"
    "zh-yue",
    re.I,
)

# ------------------------------------------------------------------------------------------------- prose

_REDIRECT = re.compile(r"\s*[#＃](?:redirect|転送|リダイレクト)\s*:?\s*\[\[([^\[\]|#]*)", re.I)
_TEMPLATE_NAMESPACE = re.compile(r"\s*:?\s*(?:template|テンプレート)\s*:", re.I)
_DISAMBIGUATION = re.compile(rf"\{{\{{\s*(?:{DISAMBIGUATION})\s*[|}}]|__DISAMBIG__", re.I)
_HEADING = re.compile(r"^(={1,6})[ \t]*(\S.*?)[ \t]*\1[ \t]*$", re.M)

# What must not be read as wikitext, and what is removed with its content. A reference never extends beyond
# the next one that opens, so that an unclosed one removes no prose. A tag that closes itself, such as the
# <nowiki/> of visual editors, has no content.
_OPAQUE = re.compile(
    r"<(?:!--.*?(?:-->|\Z)"
    r"|ref(?:\s[^<>]*?)?(?:/>|>[^<]*(?:<(?!/?ref[\s/>])[^<]*)*</ref\s*>)"
    r"|(?P<literal>nowiki|math|chem|ce|poem)\b[^>]*(?<!/)>(?P<content>.*?)</(?P=literal)\s*>"
    r"|(?P<block>gallery|syntaxhighlight|source|pre|score|timeline|imagemap|mapframe|graph|hiero|table|includeonly)\b[^>]*(?<!/)>"
    r".*?</(?P=block)\s*>"
    r")",
    re.I | re.S,
)
_UNCLOSED_REFERENCE = re.compile(r"<ref(?:\s[^<>\n]*)?>.*", re.I)
_PARAMETER = re.compile(r"\{\{\{[^{}|]*(?:\|([^{}]*))?\}\}\}")
_RUBY = re.compile(r"<ruby\b[^>]*>(.*?)</ruby\s*>", re.I | re.S)
_RUBY_PARENTHESIS = re.compile(r"<rp>[^<]*(?:</rp>)?", re.I)
_RUBY_TEXT = re.compile(r"<rt\b[^>]*>([^<]*)(?:</rt>)?", re.I)
_SUPERSCRIPT = re.compile(r"<sup>([0-9+−-]+)</sup>", re.I)
_BLOCK_TAG = re.compile(r"</?(?:br|hr|p|div|blockquote|center|ul|ol|li|dl|dt|dd|h[1-6])\b[^<>]*>", re.I)
_TAG = re.compile(r"</?[a-z][a-z0-9]*(?:\s[^<>]*)?/?>", re.I)
_MAGIC_WORD = re.compile(r"__(?:[A-Z]+|[ぁ-んァ-ヶ一-龠]+)__")
_TABLE = re.compile(r"^[ \t:*#]*(?P<open>\{\|)|^[ \t]*\|\}(?!\}(?!\}))", re.M)
_TABLE_LINE = re.compile(r"^[ \t:*#]*(?:\{\||\||!).*", re.M)
_DEPTH = 40  # how deep MediaWiki lets templates nest
_EXTERNAL_LINK = re.compile(r"\[(?:https?:|ftp:|mailto:)?//[^\s\[\]]+(?:[ \t]+([^\[\]\n]*))?\]", re.I)
_FLAT_LINK = re.compile(r"\[\[([^\[\]{}|\n]*)(?:\|([^\[\]{}]*))?\]\]")
_FLAT_TEMPLATE = re.compile(r"\{\{([^{}]*)\}\}")
_PLACEHOLDER = re.compile(r"\{([^{}]+)\}")
_QUOTES = re.compile(r"'{2,}")
_REMAINS = re.compile(r"\{\{.*|\}\}|\[\[|\]\]|\|\}")
_RULE = re.compile(r"-{4,}")
_NO_CHARACTER = re.compile(r"&#[0-9]{8,};?")  # a number far beyond Unicode's
_SPACES = re.compile(r"[ \t\u00a0]+")
# Parentheses that became empty, except those of a call, f().
_EMPTY_PARENTHESES = re.compile(r"（[\s、,;；:：]*）|(?<![\w\])])[ ]?\([\s、,;:]*\)", re.A)
_AFTER_OPENING = re.compile(r"（[ ]*(?:[、,;；][ ]*)+")
# Without ;, which ends entities. Begins only where it can: a long run of spaces would take quadratic time.
_BEFORE_CLOSING = re.compile(r"(?<![ 、,；])(?:[ ]*[、,；])+[ ]*）")
_POWER = re.compile(r"(?<=[a-z])[23]$")  # of a unit: km2
_ESCAPES = str.maketrans({character: f"&#{ord(character)};" for character in "&{}[]|<>'=*#:;_-"})
_SUPERSCRIPTS = str.maketrans("0123456789+-−", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻")


class Templates:
    """How the templates of a wiki are read: by a user's own table, by our tables, by redirects between them.

    own: the key ``templates`` of a source: the number of the parameter that a template shows, or a form as in
    `TEMPLATES`, or the name of a template that is read in the same way. aliases: redirects of the Template
    namespace, from `template_redirect`. Names may be written as in an article.
    dropped: for each template that is not known: its uses, those in a line of text, where it leaves a hole,
    and an example. It grows with the text that is extracted.
    """

    def __init__(
        self,
        own: Mapping[str, int | str] | None = None,
        aliases: Mapping[str, str] | None = None,
        dropped: dict[str, list[Any]] | None = None,
    ) -> None:
        self.own: dict[str, str] = {}
        self.aliases = dict(aliases or {})
        self.dropped = {} if dropped is None else dropped
        for name, form in (own or {}).items():
            if isinstance(form, int):
                self.own[template_name(name)] = f"{{{form}}}"
            elif form and "{" not in form:
                self.aliases[template_name(name)] = template_name(form)
            else:
                self.own[template_name(name)] = form
        names = [name for name, target in self.aliases.items() if re.fullmatch(DISAMBIGUATION, target)]
        names = sorted(re.escape(name).replace(r"\ ", "[ _]") for name in names)
        self.disambiguation = re.compile(rf"\{{\{{\s*(?:{'|'.join(names)})\s*[|}}]", re.I) if names else None

    def knows(self, name: str) -> bool:
        """Whether a template, by its `template_name`, has a reading."""
        if name in self.own or name in self.aliases or name in TEMPLATES or name in COMPUTED:
            return True
        return name in COUNTRIES or name.startswith("lang-") or bool(re.fullmatch(DISAMBIGUATION, name))

    def drop(self, name: str, parameters: list[str], text: str, start: int, end: int) -> None:
        """Count a template that is not known, which is between `start` and `end` of a text."""
        word, colon, _ = name.partition(":")
        if word in MAGIC_WORDS_OUT:
            return
        before = text[text.rfind("\n", 0, start) + 1 : start]
        after = text[end : end + 20].partition("\n")[0]
        in_another = before.rfind("{{") > before.rfind("}}") or before.lstrip()[:1] in ("|", "!")
        in_a_line = not in_another and bool((before + after).strip(" *#:;"))
        entry = self.dropped.setdefault((word + colon)[:60], [0, 0, ""])
        entry[0] += 1
        entry[1] += in_a_line
        if entry[in_a_line] == 1:  # the first one, or better: the first one in a line of text
            entry[2] = f"{before[-40:]}{{{{{'|'.join([name, *parameters])[:80]}}}}}{after}"


def template_name(name: str) -> str:
    """A template's name as in our tables: {{Template:Nowrap_}} is nowrap."""
    name = name.strip().replace("_", " ").lower().strip()
    return _TEMPLATE_NAMESPACE.sub("", name).strip() if ":" in name else name


def template_redirect(title: str, text: str) -> tuple[str, str] | None:
    """The names of a template and of the one that it redirects to, if a page is such a redirect."""
    redirect = _REDIRECT.match(text) if _TEMPLATE_NAMESPACE.match(title) else None
    if redirect is None or not _TEMPLATE_NAMESPACE.match(redirect[1]):
        return None
    return template_name(title), template_name(redirect[1])


def extract(title: str, text: str, templates: Templates | None = None) -> tuple[str, str]:
    """The prose of an article's wikitext and "", or "" and the reason why it has no prose.

    The reasons: "redirect", "disambiguation", "empty". templates: how they are read; those that are not known
    are counted in it. Never raises, for any wikitext.
    """
    templates = templates or Templates()
    if _REDIRECT.match(text):
        return "", "redirect"
    text = _OPAQUE.sub(_opaque, text)
    if title.endswith("(曖昧さ回避)") or _DISAMBIGUATION.search(text):
        return "", "disambiguation"
    if templates.disambiguation and templates.disambiguation.search(text):
        return "", "disambiguation"
    text = _drop_sections(text)
    text = _QUOTES.sub(_unquote, _resolve_tags(text))
    text = _drop_tables(text)
    text = _resolve(text, title, templates)
    text = _EMPTY_PARENTHESES.sub("", text)
    text = _BEFORE_CLOSING.sub("）", _AFTER_OPENING.sub("（", text))
    prose = "\n".join(_lines(_drop_remains(text)))
    return prose, "" if prose else "empty"


def _opaque(match: re.Match[str]) -> str:
    kind, content = match["literal"], match["content"]
    if not kind:
        return ""
    if kind.lower() == "poem":
        return "\n\n" + content.replace("\n", "\n\n") + "\n\n"
    if kind.lower() != "nowiki":  # a formula: its double braces would look like a template
        content = re.sub(r"([{}])(?=\1)", r"\1 ", " ".join(content.split()))
    return _unescape(content).translate(_ESCAPES)


def _unescape(text: str) -> str:
    """Text with characters in place of their entities; Python refuses numbers of thousands of digits."""
    return html.unescape(_NO_CHARACTER.sub("\ufffd", text))


def _drop_sections(text: str) -> str:
    """Remove the sections whose heading is in `CUT`, or combines several of it (脚注・出典, 脚注と参考文献).

    One of the second level ends the page.
    """
    kept, start, dropping = [], 0, 0
    for heading in _HEADING.finditer(text):
        level = len(heading[1])
        if dropping and level <= dropping:
            start, dropping = heading.start(), 0
        if not dropping and all(part.strip(" '") in CUT for part in re.split("[・と、/]", heading[2])):
            kept.append(text[start : heading.start()])
            if level <= 2:
                return "".join(kept)
            dropping = level
    return "".join(kept) + ("" if dropping else text[start:])


def _resolve_tags(text: str) -> str:
    """Remove HTML tags; block elements become ends of paragraphs."""
    text = _MAGIC_WORD.sub("", text)
    if "<" not in text:
        return text
    text = _UNCLOSED_REFERENCE.sub("", text)
    text = _RUBY.sub(lambda ruby: _RUBY_TEXT.sub(r"（\1）", _RUBY_PARENTHESIS.sub("", ruby[1])), text)
    text = _SUPERSCRIPT.sub(lambda number: number[1].translate(_SUPERSCRIPTS), text)
    return _TAG.sub("", _BLOCK_TAG.sub("\n\n", text))


def _unquote(run: re.Match[str]) -> str:
    """Two to five apostrophes are italics, bold or both; those that mean nothing to MediaWiki stay."""
    length = len(run[0])
    return "'" if length == 4 else "'" * (length - 5)


def _drop_tables(text: str) -> str:
    """Remove tables, also nested ones; of an unclosed table, the lines that look like table lines."""
    if "{|" not in text:
        return text
    opened: list[int] = []
    spans: list[tuple[int, int]] = []
    for mark in _TABLE.finditer(text):
        if mark["open"]:
            opened.append(mark.start())
        elif opened:
            start = opened.pop()
            spans = [span for span in spans if span[0] < start] + [(start, mark.end())]
    for start, end in reversed(spans):
        text = text[:start] + text[end:]
    if opened:
        text = text[: opened[0]] + _TABLE_LINE.sub("", text[opened[0] :])
    return text


def _resolve(text: str, title: str, templates: Templates) -> str:
    """Replace links and templates by the text that they show."""

    def template(match: re.Match[str]) -> str:
        if "[[" in match[1]:
            return match[0]  # a link with markup in it: its | does not separate parameters
        name, *parameters = match[1].split("|")
        shown = _template(name, parameters, title, templates)
        if shown is None:
            templates.drop(template_name(name), parameters, match.string, *match.span())
        return shown or ""

    text = _PARAMETER.sub(lambda parameter: parameter[1] or "", text)
    text = _EXTERNAL_LINK.sub(lambda link: link[1] or "", text)
    for _ in range(_DEPTH):
        before = text
        text = _FLAT_LINK.sub(lambda link: _link(link[1], link[2]), text)
        text = _FLAT_TEMPLATE.sub(template, text)
        if text == before:
            break
    if "{{" in text or "[[" in text:
        # What is nested deeper than Python can follow stays, and `_drop_remains` removes its brackets.
        with contextlib.suppress(RecursionError):
            text = _render(mwparserfromhell.parse(text, skip_style_tags=True), title, templates)
    return text


def _drop_remains(text: str) -> str:
    """Remove brackets without a partner, and the rest of the line after an unclosed ``{{``."""
    while (rest := _REMAINS.sub("", text)) != text:
        text = rest
    return text


def _render(code: Wikicode, title: str, templates: Templates) -> str:
    """As `_resolve`, for markup within markup, from the nodes of a parse."""
    parts = []
    for node in code.nodes:
        if isinstance(node, Wikilink):
            label = None if node.text is None else _render(node.text, title, templates)
            parts.append(_link(_render(node.title, title, templates), label))
        elif isinstance(node, Template):
            parameters = [
                (f"{parameter.name}=" if parameter.showkey else "")
                + _render(parameter.value, title, templates)
                for parameter in node.params
            ]
            name = _render(node.name, title, templates)
            shown = _template(name, parameters, title, templates)
            if shown is None:
                before = "".join(parts)
                templates.drop(template_name(name), parameters, before, len(before), len(before))
            parts.append(shown or "")
        elif isinstance(node, Heading):
            marks = "=" * node.level
            parts.append(f"{marks}{_render(node.title, title, templates)}{marks}")
        else:
            parts.append(str(node))
    return "".join(parts)


def _link(target: str, label: str | None) -> str:
    """What ``[[target|label]]`` shows: nothing for files, categories and interlanguage links."""
    target = target.strip()
    prefix, colon, _ = target.partition(":")
    if colon and PREFIXES_OUT.fullmatch(prefix.strip()):
        return ""
    return label.strip() if label else target.removeprefix(":")


def _template(name: str, parameters: list[str], title: str, templates: Templates) -> str | None:
    """What a template shows according to the tables above; None for one that is not in them."""
    name = template_name(name)
    form = templates.own.get(name)
    if form is None:
        name = templates.aliases.get(name, name)
        form = templates.own.get(name, TEMPLATES.get(name))
    if form is None:
        if name in ("pagename", "fullpagename"):
            return title
        if name.startswith("formatnum:"):
            return _group_digits(name.removeprefix("formatnum:"))
        if name in COUNTRIES:
            return COUNTRIES[name]
        if not (name.startswith("lang-") or name in COMPUTED):
            return None
    values: dict[str, str] = {}
    for parameter in parameters:
        key, equals, value = parameter.partition("=")
        if equals:
            values[key.strip()] = value.strip()
        else:
            values[str(1 + sum(key.isdigit() for key in values))] = parameter.strip()
    if form is not None:
        return _PLACEHOLDER.sub(
            lambda keys: next(filter(None, map(values.get, keys[1].split("|"))), ""), form
        )
    if name in COMPUTED:
        return COMPUTED[name](values)
    code = name.removeprefix("lang-")
    names = LANGUAGE_NAMES.get(code.removesuffix("-short"), ("", ""))
    language = names[code.endswith("-short")]
    return f"{language}: {values.get('1', '')}" if language else values.get("1", "")


def _group_digits(number: str) -> str:
    """45000.5 as 45,000.5; other text unchanged."""
    found = re.fullmatch(r"\s*([-−+]?)([0-9]{1,300})(\.[0-9]+)?\s*", number)
    return f"{found[1]}{int(found[2]):,}{found[3] or ''}" if found else number


def _convert(values: dict[str, str]) -> str:
    number, after = _range(values)
    shown = _quantity(number, values.get(str(after), ""), values)
    more, unit = values.get(str(after + 1), ""), values.get(str(after + 2), "")
    if more.isdecimal() and unit.lower() in UNITS:  # {{convert|5|ft|6|in|m}}
        shown += (" " if values.get("abbr") == "on" else "") + _quantity(more, unit, values)
    return shown


def _range(values: dict[str, str]) -> tuple[str, int]:
    """The number or range that begins the parameters, as in {{convert|20|-|30|m}}, and what follows it."""
    number, after = values.get("1", ""), 2
    while sign := _RANGES.get(values.get(str(after), "").lower()):
        number += sign + values.get(str(after + 1), "")
        after += 2
    return number, after


def _quantity(number: str, unit: str, values: dict[str, str]) -> str:
    if values.get("abbr") == "on" or unit.lower() not in UNITS:
        return f"{number} {_POWER.sub(lambda power: power[0].translate(_SUPERSCRIPTS), unit)}".strip()
    return number + UNITS[unit.lower()]


def _abbreviated(values: dict[str, str]) -> str:
    return _convert({"abbr": "on"} | values)


def _value(values: dict[str, str]) -> str:
    exponent, unit = values.get("e", ""), values.get("u") or values.get("ul", "")
    power = "×10" + exponent.translate(_SUPERSCRIPTS) if exponent else ""
    number, after = _range(values)
    errors = [values[key] for key in (str(after), str(after + 1)) if values.get(key)]
    if len(errors) == 1:  # {{val|1.5|0.2}}; two are signed
        errors.insert(0, "±")
    return f"{number}{''.join(errors)}{power} {unit}".strip()


def _fraction(values: dict[str, str]) -> str:
    *whole, top, bottom = ["1", "1", *(values[key] for key in ("1", "2", "3") if key in values)]
    return " ".join([*whole[2:], f"{top}/{bottom}"])


def _date(values: dict[str, str]) -> str:
    return "".join(values[key] + unit for key, unit in zip("123", "年月日", strict=True) if values.get(key))


def _formula(values: dict[str, str]) -> str:
    return "".join(value for key, value in values.items() if key.isdigit())


COMPUTED: dict[str, Callable[[dict[str, str]], str]] = {
    "convert": _convert,
    "cvt": _abbreviated,
    "gaps": _formula,
    "nts": lambda values: _group_digits(values.get("1", "")),
    "val": _value,
    "frac": _fraction,
    "sfrac": _fraction,
    "chem": _formula,
    "年月日": _date,
}


def _lines(text: str) -> Iterator[str]:
    """The lines of prose: paragraphs joined, without list marks, headings only if text follows."""
    headings: list[tuple[int, str]] = []
    for level, block in _blocks(text):
        if "&" in block:
            block = _unescape(block)
        block = _SPACES.sub(" ", block.replace("\n", " ")).strip()
        if level:
            headings = [heading for heading in headings if heading[0] < level] + [(level, block)]
        elif block:
            yield from (heading for _, heading in headings)
            headings = []
            yield block


def _blocks(text: str) -> Iterator[tuple[int, str]]:
    """Headings with their level; paragraphs and list items with level 0."""
    paragraph = ""
    for raw in text.split("\n"):
        line = raw.strip()
        if line and raw[0] not in " *#:;=|-":
            # One space between two words in Latin letters, nothing between Japanese ones.
            space = " " if paragraph and paragraph[-1] < "\x80" and line[0] < "\x80" else ""
            paragraph += space + line
            continue
        if paragraph:
            yield 0, paragraph
            paragraph = ""
        if not line or line[0] == "|":
            continue
        if heading := _HEADING.match(line):
            yield len(heading[1]), heading[2]
            continue
        item = line.lstrip("*#:;")
        term, colon, definition = item.partition(":")
        if line[0] == ";" and colon and not definition.startswith("//"):
            yield 0, term
            item = definition
        rule = _RULE.match(item)
        yield 0, item[rule.end() :] if rule else item
    if paragraph:
        yield 0, paragraph
