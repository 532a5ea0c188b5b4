"""New tokens that are added to a published tokenizer."""

import json

from published_checkpoint import TEXT, extended, write_checkpoint
from recipe.tokenization.encode_text import encode_texts
from tokenizers import Tokenizer, models, pre_tokenizers


def test_new_pieces_of_bpe_stand_for_what_the_old_tokenizer_made(tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint")
    old, _ = extended(folder, 0)
    new, pieces = extended(folder, 100)
    assert pieces.first == 300 and len(pieces.old_ids) == 100
    assert all(len(ids) > 1 and max(ids) < 300 for ids in pieces.old_ids)
    for before, after in zip(encode_texts(old, TEXT), encode_texts(new, TEXT), strict=True):
        assert len(after) < len(before) and pieces.spelled(after) == before


def test_new_pieces_of_unigram_stand_for_what_the_old_tokenizer_made(tmp_path):
    alphabet = [("<unk>", 0.0), ("</s>", -9.0), ("▁", -4.0)]
    alphabet += [(letter, -5.0) for letter in sorted(set("".join(TEXT)))]
    tokenizer = Tokenizer(models.Unigram(alphabet, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    new, pieces = extended(tmp_path, 50)
    names = new.convert_ids_to_tokens(list(range(len(new))))
    assert len(pieces.old_ids) == 50
    for name, ids in zip(names[pieces.first :], pieces.old_ids, strict=True):
        assert [names[i] for i in ids] == list(name)  # no ▁ before it
