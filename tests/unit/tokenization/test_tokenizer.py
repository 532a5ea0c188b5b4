"""Tokenizers of every kind: saved as trained, without loss of text, and text is never a control token."""

import io
import json
import random
import shutil
import sys
import types

import pytest
import sentencepiece as spm
from conftest import sentences
from recipe.config.tokenizer import TOKENIZER_KINDS
from recipe.project import RecipeError
from recipe.tokenization import convert, encode_corpus, published, report
from recipe.tokenization import encode_text as subject
from recipe.tokenization import sample as sampling
from recipe.tokenization import train as training
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

TEXT = sentences(2000, 1)
UNIGRAM = {"vocab_size": 410, "user_symbols": ["[改行]"]}
BPE = {"kind": "bpe", "vocab_size": 440}
BYTE_LEVEL = {
    "kind": "byte-level-bpe",
    "vocab_size": 400,
    "unk_token": None,
    "bos_token": None,
    "pad_token": None,
}
WORDS = {"kind": "word-bpe", "vocab_size": 150, "pad_token": None, "segmenter": "stub"}
MARKS = {" ": "▁", "\n": "␊", "\t": "␉"}


class Segmenter:
    """Words of two characters, white space as marks: in the form of tokenization/word_segmenter.py."""

    def segment(self, texts):
        marked = ("".join(MARKS.get(c, c) for c in text) for text in texts)
        return [" ".join(text[i : i + 2] for i in range(0, len(text), 2)) for text in marked]


@pytest.fixture(autouse=True, scope="module")
def stub_segmenter():
    """A segmenter that needs no program or dictionary, instead of the real one."""
    module = types.ModuleType("recipe.tokenization.word_segmenter")
    module.make_segmenter = lambda name, data: Segmenter()
    real = sys.modules.get("recipe.tokenization.word_segmenter")
    sys.modules["recipe.tokenization.word_segmenter"] = module
    subject.segmenter.cache_clear()
    yield
    subject.segmenter.cache_clear()
    sys.modules.pop("recipe.tokenization.word_segmenter")
    if real:
        sys.modules["recipe.tokenization.word_segmenter"] = real


def reload(tokenizer, folder):
    """Save a tokenizer, and load it by AutoTokenizer as a user does."""
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Train a kind once, save it, load it: (tokenizer, SentencePiece processor or None)."""
    made = {}

    def make_one(config):
        key = json.dumps(config)
        if key not in made:
            text = Segmenter().segment(TEXT) if config.get("segmenter") else TEXT
            trained = training.train_tokenizer(text, config)
            model = trained.sentencepiece
            processor = spm.SentencePieceProcessor(model_proto=model) if model else None
            made[key] = reload(trained.tokenizer, tmp_path_factory.mktemp("tokenizer")), processor
        return made[key]

    return make_one


# ---------------------------------------------------------------------------------------- all trained kinds


@pytest.mark.parametrize("config", [UNIGRAM, BPE, BYTE_LEVEL])
def test_nothing_is_lost_in_hard_cases_and_random_unicode(make, config):
    fast, processor = make(config)
    draw = random.Random(0)
    alphabet = "あア漢𠮷ｱ👨\u200d🌈é\u0301 \u3000\t\n\r\x00\x01aZ09<>/sxEpadunk▁☃学校で"
    texts = ["".join(draw.choice(alphabet) for _ in range(draw.randrange(60))) for _ in range(2000)]
    found = report.check_lossless(fast, texts + sentences(300, 2), processor)
    assert found["texts"] == 2300 + len(report.HARD_CASES) + 1
    # SentencePiece reads U+2581 as a space, also in the long line at the end.
    marked = sum("▁" in text for text in [*texts, *report.HARD_CASES]) + 1 if processor else 0
    assert found["with_u2581"] == marked and found["lossless"] == found["texts"] - marked
    assert ("identical_ids" in found) == (processor is not None)


@pytest.mark.parametrize("config", [UNIGRAM, BPE, BYTE_LEVEL, WORDS])
@pytest.mark.parametrize("text", ["</s>", "a<s>b</s>", "<pad><unk>", "<0xE5>", "<<s>>", "<", "終</s>わり"])
def test_special_strings_in_text_stay_text(make, config, text):
    fast, processor = make(config)
    ids = subject.encode_text(fast, text)
    names = set(fast.convert_ids_to_tokens(ids))
    assert not names & ({"<pad>", "<s>", "</s>", "<0xE5>"} | ({"<unk>"} if config is not WORDS else set()))
    if config is not WORDS:
        assert fast.decode(ids) == text


@pytest.mark.parametrize(
    ("config", "ids"),
    [(UNIGRAM, (0, 1, 2, 3)), (BPE, (0, 1, 2, 3)), (BYTE_LEVEL, (0, None, None, 0)), (WORDS, (2, 0, 1, 2))],
)
def test_special_ids_and_document_start(make, config, ids):
    fast, _ = make(config)
    assert (fast.pad_token_id, fast.unk_token_id, fast.bos_token_id, fast.eos_token_id) == ids
    start = [] if ids[2] is None else [ids[2]]
    text = subject.encode_text(fast, "山")
    assert text and subject.prompt_ids(fast, "山") == [*start, *text]
    assert subject.document_ids(fast, "山") == [*start, *text, ids[3]]
    if config is not WORDS:
        assert fast("山")["input_ids"] == [*start, *text]
    assert len(fast) == config["vocab_size"]


def test_ids_may_be_chosen():
    chosen = {"pad_token_id": 3, "unk_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "eos_token": "<終>"}
    for config in (
        UNIGRAM,
        BPE,
        BYTE_LEVEL | {"unk_token": "<unk>", "bos_token": "<s>", "pad_token": "<pad>"},
    ):
        fast = training.train_tokenizer(TEXT, config | chosen).tokenizer
        assert (fast.pad_token_id, fast.unk_token_id, fast.bos_token_id, fast.eos_token_id) == (3, 0, 2, 1)
        assert fast.convert_ids_to_tokens(1) == "<終>"


@pytest.mark.parametrize("kind", [UNIGRAM, BYTE_LEVEL | {"user_symbols": ["[改行]"]}])
def test_user_symbols_are_one_token_and_text(make, kind):
    fast, processor = make(kind)
    ids = subject.encode_text(fast, "山[改行]山")
    assert fast.convert_ids_to_tokens(ids).count("[改行]") == 1
    assert fast.decode(ids, skip_special_tokens=True) == "山[改行]山"
    if processor:
        assert processor.encode("山[改行]山") == ids


@pytest.mark.parametrize("config", [UNIGRAM, BPE, BYTE_LEVEL, WORDS])
def test_vocabulary_larger_than_the_text_supports_is_refused(config):
    with pytest.raises(RecipeError, match=r"vocabulary of 5000 .* \d+ tokens\. Lower tokenizer\.vocab_size"):
        training.train_tokenizer(["短い文。短い文。"], config | {"vocab_size": 5000})


@pytest.mark.parametrize("config", [UNIGRAM, BPE])
def test_vocabulary_too_small_for_its_characters_is_refused(config):
    with pytest.raises(RecipeError, match=r"vocabulary of 100: .* need 3\d\d\. Raise tokenizer\.vocab_size"):
        training.train_tokenizer(TEXT, config | {"vocab_size": 100})


@pytest.mark.parametrize("config", [UNIGRAM, BPE, BYTE_LEVEL, WORDS])
def test_empty_corpus_is_refused(config):
    with pytest.raises(RecipeError, match="Add text"):
        training.train_tokenizer([], config)


@pytest.mark.parametrize("config", [UNIGRAM, BYTE_LEVEL])
def test_lone_surrogates_are_refused(make, config):
    with pytest.raises(RecipeError, match=r"lone surrogate '\\ud83d' at character 2, after '山と'"):
        subject.encode_text(make(config)[0], "山と\ud83d")


def test_training_is_the_same_every_time():
    assert training.train_sentencepiece(TEXT, UNIGRAM) == training.train_sentencepiece(TEXT, UNIGRAM)


def test_every_kind_that_is_trained_has_its_function():
    """Otherwise the configuration accepts a kind with which stage 03 fails."""
    assert training.TRAINERS.keys() == {name for name, kind in TOKENIZER_KINDS.items() if kind.trained}


# -------------------------------------------------------------------------------------------- SentencePiece


def test_other_ids_than_sentencepiece_are_refused(make):
    _, processor = make(UNIGRAM)
    other = training.train_tokenizer(sentences(2000, 9)[:300], {"vocab_size": 400}).tokenizer
    with pytest.raises(RecipeError, match="disagree"):
        report.check_lossless(other, sentences(50, 2), processor)


def test_a_tokenizer_that_loses_text_is_refused(make):
    fast, _ = make(BPE)
    lossy = Tokenizer.from_str(fast.backend_tokenizer.to_str())
    lossy.decoder = decoders.Sequence([decoders.Replace("▁", ""), decoders.ByteFallback(), decoders.Fuse()])
    with pytest.raises(RecipeError, match="comes back as"):
        report.check_lossless(convert.as_fast(lossy, {"eos_token": "</s>"}), [])


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_equal_ways_to_cut_are_decided_alike(kind):
    """Runs of one letter have several best ways to cut them.

    With the scores as trained, rounding would decide: in float32 or in float64.
    """
    draw = random.Random(3)
    text = ["".join(draw.choice("abc") * draw.randrange(1, 9) for _ in range(12)) for _ in range(3000)]
    model = training.train_sentencepiece(text, {"kind": kind, "vocab_size": 360})
    processor = spm.SentencePieceProcessor(model_proto=model)
    fast = convert.from_sentencepiece(model)
    assert [encoding.ids for encoding in fast.encode_batch(text)] == processor.encode(text)
    assert all(processor.get_score(i) * 8 % 1 == 0 for i in range(360))


def test_normalising_models_are_taken_over():
    """A model with NFKC, a space in front and extra spaces removed, as published ones have."""
    for kind in ("unigram", "bpe"):
        model = io.BytesIO()
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXT),
            model_writer=model,
            model_type=kind,
            vocab_size=140,
            normalization_rule_name="nfkc",
            minloglevel=2,
        )
        processor = spm.SentencePieceProcessor(model_proto=model.getvalue())
        fast = convert.from_sentencepiece(model.getvalue())
        for text in ["ﾊﾝｶｸ　１２", "  山  に ", "", " ", "山", "10〜20時、私は", *TEXT[:200]]:
            assert fast.encode(text).ids == processor.encode(text), text


# ------------------------------------------------------------------------------------------------ word BPE


def test_words_decode_to_the_text(make):
    fast, _ = make(WORDS)
    text = "今日、 私は\n家で9回\t本を読みました。"
    ids = subject.encode_text(fast, text)
    assert fast.decode(ids) == text
    assert fast.init_kwargs["segmenter"] == "stub"


def test_lost_text_is_measured(make):
    fast, _ = make(WORDS)
    found = report.measure_lost_text(fast, ["今日、私は", "鱻鱻", "家で"])
    assert found["exact_lines"] == pytest.approx(2 / 3)
    assert found["unknown_rate"] > 0
    assert found["changed"][0]["line"] == "鱻鱻"


def test_limits_of_the_alphabet_and_of_frequency():
    few = training.train_tokenizer(TEXT, WORDS | {"vocab_size": 36, "limit_alphabet": 20}).tokenizer
    assert sum(len(token) == 1 for token in few.get_vocab()) == 20
    with pytest.raises(RecipeError, match="lower min_frequency"):
        training.train_tokenizer(TEXT, WORDS | {"min_frequency": 10**6})


# ----------------------------------------------------------------------------------------------- published


@pytest.fixture()
def byte_level_folder(tmp_path_factory):
    """A published byte-level BPE of English, with a control token after its vocabulary."""
    folder = tmp_path_factory.mktemp("published")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["the cat sat on the mat, the dog on the log"] * 20, trainer)
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {"eos_token": "<|end|>", "bos_token": {"content": "<|end|>"}, "tokenizer_class": "GPT2Tokenizer"}
        )
    )
    return folder


def take_over(path, **config):
    found = published.load_published(published.find_published(str(path)))
    return published.take_over(found, {"kind": "published", "published": str(path)} | config, TEXT)[0]


def test_published_bpe_keeps_its_ids_and_its_document_start(byte_level_folder, tmp_path):
    fast = reload(take_over(byte_level_folder), tmp_path / "saved")
    plain = Tokenizer.from_file(str(byte_level_folder / "tokenizer.json"))
    for text in ("the cat 山", " on  the\nmat", "𠮷"):
        assert subject.encode_text(fast, text) == plain.encode(text).ids
        assert fast.decode(subject.encode_text(fast, text)) == text
    end = plain.token_to_id("<|end|>")
    assert (fast.bos_token_id, fast.eos_token_id, fast.pad_token_id) == (None, end, end)
    assert subject.document_ids(fast, "cat")[-1:] == [end] and subject.document_start(fast) == []
    started = take_over(byte_level_folder, bos_token="<|end|>")
    assert subject.document_start(started) == [end] and started("cat")["input_ids"][0] == end


def test_tokens_behind_a_control_token_keep_their_ids(byte_level_folder):
    """As in Qwen's tokenizers, whose <think> is no control token and has an id above theirs."""
    file = byte_level_folder / "tokenizer.json"
    plain = Tokenizer.from_file(str(file))
    plain.add_tokens(["<think>"])
    plain.add_special_tokens(["<|more|>"])
    plain.add_tokens(["</think>"])
    plain.save(str(file))
    fast = take_over(byte_level_folder)
    text = "<think>the cat</think>"
    ids = subject.encode_text(fast, text)
    assert ids == plain.encode(text).ids and ids[0] == plain.token_to_id("<think>")
    assert not {plain.token_to_id(t) for t in ("<|end|>", "<|more|>")} & {
        *subject.encode_text(fast, "<|end|> <|more|>")
    }


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["{", "[1]", "version https://git-lfs.github.com/spec/v1"])
def test_damaged_files_of_a_published_tokenizer_are_named(byte_level_folder, name, content):
    (byte_level_folder / name).write_text(content)
    with pytest.raises(RecipeError, match=f"{name}: no.*Get the file again"):
        take_over(byte_level_folder)


def test_published_bpe_is_extended(byte_level_folder, tmp_path):
    old = Tokenizer.from_file(str(byte_level_folder / "tokenizer.json"))
    fast = reload(take_over(byte_level_folder, new_pieces=100, round_to=64), tmp_path / "saved")
    assert len(fast) == 384  # 274 + 100, rounded up
    assert all(fast.convert_ids_to_tokens(i) == token for token, i in old.get_vocab().items())
    assert subject.encode_text(fast, "the cat sat<|end|>") == [
        i for part in ("the cat sat", "<|", "end", "|>") for i in old.encode(part).ids
    ]
    sample = sentences(100, 7)
    before = sum(len(old.encode(text).ids) for text in sample)
    after = [subject.encode_text(fast, text) for text in sample]
    assert sum(map(len, after)) < 0.4 * before
    assert [fast.decode(ids) for ids in after] == sample
    used = {i for ids in after for i in ids if i >= 274}
    assert len(used) > 20


@pytest.fixture()
def sentencepiece_folder(tmp_path_factory):
    """A published Unigram with [PAD], NFKC and lower case, and no tokenizer.json."""
    folder = tmp_path_factory.mktemp("published")
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat, the dog on the log. 山 Linux"] * 20 + TEXT[:50]),
        model_writer=model,
        vocab_size=130,
        normalization_rule_name="nmt_nfkc",
        minloglevel=2,
        pad_id=3,
        pad_piece="[PAD]",
        unk_id=0,
        bos_id=1,
        eos_id=2,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"do_lower_case": True, "tokenizer_class": "T5Tokenizer", "pad_token": "[PAD]"})
    )
    return folder


def test_published_sentencepiece_keeps_its_ids(sentencepiece_folder, tmp_path):
    fast = reload(take_over(sentencepiece_folder), tmp_path / "saved")
    assert (fast.pad_token_id, fast.unk_token_id, fast.bos_token_id, fast.eos_token_id) == (3, 0, None, 2)
    processor = spm.SentencePieceProcessor(model_file=str(sentencepiece_folder / "spiece.model"))
    for text in ("The CAT　sat", "１０時", "  on  the ", "", *TEXT[:50]):
        assert subject.encode_text(fast, text) == processor.encode(text.lower()), text
        assert fast(text)["input_ids"] == subject.encode_text(fast, text)
    file = take_over(sentencepiece_folder / "spiece.model", bos_token="<s>")
    assert subject.document_ids(file, "cat") == [1, *processor.encode("cat"), 2]
    found = report.measure_lost_text(fast, ["the cat", "The cat"])
    assert found["exact_lines"] == 0.5


@pytest.mark.parametrize(
    ("settings", "start"),
    [
        ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}, [1]),
        ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}, []),
        ({"add_bos_token": True}, [1]),
        ({"tokenizer_class": "T5Tokenizer"}, []),
        ({}, []),
    ],
)
def test_what_a_published_sentencepiece_folder_puts_first_is_before_every_document(
    sentencepiece_folder, tmp_path, settings, start
):
    """SentencePiece itself puts nothing first: the class and add_bos_token of the folder decide."""
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "[PAD]"}
    config = names | settings if settings else {}
    (sentencepiece_folder / "tokenizer_config.json").write_text(json.dumps(config))
    fast = reload(take_over(sentencepiece_folder), tmp_path / "saved")
    text = subject.encode_text(fast, "the cat")
    assert subject.document_ids(fast, "the cat") == [*start, *text, 2]
    assert fast("the cat")["input_ids"] == subject.prompt_ids(fast, "the cat") == start + text
    assert encode_corpus.document_frame(tmp_path / "saved") == (start, [2])
    if "tokenizer_class" in settings:
        own = AutoTokenizer.from_pretrained(sentencepiece_folder)
        assert own("a")["input_ids"][:1] == start or not start


def test_what_a_published_tokenizer_json_puts_first_is_before_every_document(byte_level_folder):
    """Its name does not matter: some tokenizers call the first token cls_token."""
    core = Tokenizer.from_file(str(byte_level_folder / "tokenizer.json"))
    core.add_special_tokens(["[CLS]"])
    first = core.token_to_id("[CLS]")

    def publish(*before):
        core.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", "<|end|>"],
            special_tokens=[(token, core.token_to_id(token)) for token in ("[CLS]", "<|end|>")],
        )
        core.save(str(byte_level_folder / "tokenizer.json"))

    publish("[CLS]")
    assert subject.document_start(take_over(byte_level_folder)) == [first]
    publish()
    assert subject.document_start(take_over(byte_level_folder)) == []
    publish("[CLS]", "<|end|>")
    with pytest.raises(RecipeError, match=r"puts \[CLS\] <\|end\|> before a text, expected one token"):
        take_over(byte_level_folder)


def test_published_unigram_is_extended(sentencepiece_folder, tmp_path):
    fast = reload(take_over(sentencepiece_folder, new_pieces=50), tmp_path / "saved")
    old = take_over(sentencepiece_folder)
    assert len(fast) == 180
    assert all(fast.convert_ids_to_tokens(i) == token for token, i in old.get_vocab().items())
    sample = sentences(100, 7)
    assert sum(map(len, subject.encode_texts(fast, sample))) < 0.8 * sum(
        map(len, subject.encode_texts(old, sample))
    )
    assert subject.encode_text(fast, "the cat") == subject.encode_text(old, "the cat")


def test_published_faults_are_named(byte_level_folder, tmp_path):
    with pytest.raises(RecipeError, match=r"tokenizer\.pad_token: '\[PAD\]' is not in the vocabulary"):
        take_over(byte_level_folder, pad_token="[PAD]")
    with pytest.raises(RecipeError, match=r"new_pieces: the text gives \d+ new tokens, expected 100000"):
        take_over(byte_level_folder, new_pieces=100_000)
    (byte_level_folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(RecipeError, match="names no end token"):
        take_over(byte_level_folder)
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "spiece.model").write_bytes(b"no model")
    with pytest.raises(RecipeError, match=r"spiece\.model: not a SentencePiece model"):
        take_over(bad)
    shutil.rmtree(bad)
    # The form of BERT for Japanese, whose class needs a library for words that is not installed.
    bad.mkdir()
    (bad / "vocab.txt").write_text("[UNK]\n[PAD]\n山\n", "utf-8")
    (bad / "tokenizer_config.json").write_text('{"tokenizer_class": "BertJapaneseTokenizer"}')
    with pytest.raises(RecipeError, match="transformers cannot read it"):
        take_over(bad)
    shutil.rmtree(bad)
    with pytest.raises(RecipeError, match="no such folder or file"):
        published.find_published(str(bad), local_files_only=True)


# -------------------------------------------------------------------------------------------------- sample


def test_sample_is_seeded_and_near_its_size():
    first, second, other = (
        list(sampling.sample_lines(TEXT, 0.25, random.Random(seed))) for seed in (1, 1, 2)
    )
    assert first == second != other
    assert 0.2 < sum(map(len, first)) / sum(map(len, TEXT)) < 0.3


def test_sentences_are_cut_at_full_stops_and_lines():
    assert list(sampling.sample_lines(["一。二。\n三"], 1.0, random.Random(0))) == ["一。", "二。", "三"]


def test_sample_follows_the_weights_and_the_bound():
    sizes = {"web": 800, "books": 100, "help": 100}
    assert sampling.sample_shares(sizes, {}, 500) == dict.fromkeys(sizes, 0.5)
    weighted = sampling.sample_shares(sizes, {"books": 4.0, "web": 0.5, "help": 0.0}, 400)
    assert weighted == {"web": 0.375, "books": 1.0, "help": 0.0}  # all of books, and web fills the rest
    assert sampling.sample_shares(sizes, {"books": 2.0}, 10**6) == dict.fromkeys(sizes, 1.0)
    assert sampling.sample_shares({}, {}, 100) == {}


def test_long_lines_are_cut_and_nothing_is_left_out():
    line = "".join(TEXT)
    cut = list(sampling.sample_lines([line.replace("。", "、")], 1.0, random.Random(0)))
    assert "".join(cut) == line.replace("。", "、")
    assert max(map(len, cut)) == sampling.LONGEST_SENTENCE
    fast = training.train_tokenizer([line], BPE).tokenizer  # one line of 100 kB: SentencePiece would skip it
    assert fast.convert_tokens_to_ids("図書館で") != fast.unk_token_id


# -------------------------------------------------------------------------------------------------- report


def test_compression_counts_no_control_tokens(make):
    for config, whole in ((UNIGRAM, "今日"), (BYTE_LEVEL, "今日")):
        fast, _ = make(config)
        figures = report.compression(fast, [whole])
        assert figures["bytes_per_token"] == 6 / figures["tokens"]
        assert figures["byte_fallback_rate"] == 0
        assert report.compression(fast, ["鱻"])["byte_fallback_rate"] == 1
    assert report.compression(make(WORDS)[0], ["鱻"])["unknown_rate"] == 1


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        (" です", "hiragana"),
        ("データ", "katakana"),
        ("ｱ", "katakana"),
        ("々", "kanji"),
        ("𠮷", "kanji"),
        ("読みました", "mixed Japanese"),
        (" the", "Latin"),
        ("Ａ", "Latin"),
        ("１2", "digits"),
        ("。」", "symbols"),
        (" ", "symbols"),
        ("2回", "other"),
        (b"\xe5", "bytes"),
    ],
)
def test_script_of_a_token(token, expected):
    assert report.script(token) == expected


def test_vocabulary_by_script_adds_up(make):
    for config in (UNIGRAM, BPE, BYTE_LEVEL, WORDS):
        fast, _ = make(config)
        found = report.describe_vocabulary(fast)
        assert sum(found["scripts"].values()) == found["size"] == len(fast)
        assert found["scripts"]["control"] == len({*fast.all_special_ids})
    assert report.describe_vocabulary(make(UNIGRAM)[0])["scripts"]["bytes"] == 128


def test_report_shows_every_tokenizer_and_what_is_missing(make, tmp_path):
    described = report.describe({"this": make(UNIGRAM)[0], "other": make(BYTE_LEVEL)[0]}, {"text": TEXT[:20]})
    text = report.report_tables(described, {"texts": 3}, {"gpt2": "not here"})
    assert all(line in text for line in ("| this | text |", "| other | text |", "- gpt2: not here"))
    assert "".join(described["other"]["sentences"][0]) == report.COMPARISON[0]
    report.draw_report(described, tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
