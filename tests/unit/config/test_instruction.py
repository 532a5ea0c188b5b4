"""The keys of instruction.json and preference.json."""

import pytest
from recipe.config import training
from recipe.config.recipe import check_recipe
from refusal import pair, preference, refusal, tiny


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda c: c["instruction"]["pairs"].update(x={"source": "tatoeba"}),
            ["pairs.x: there are no pack"],
        ),
        (
            lambda c: c["instruction"]["pairs"].update(transaltion={"source": "tatoeba"}),
            ["'translation'", "`path`"],
        ),
        (
            lambda c: pair(c, directions=["fr"]),
            ["directions", "ja-en"],
        ),
        (lambda c: c["instruction"].pop("pairs"), ["instruction.json: pairs: missing", '"pairs": {}']),
        (lambda c: c["instruction"].update(valid_share=7), ["valid_share: 7"]),
        (lambda c: preference(c, z_loss=1e-4), ["preference.json: z_loss", "stage 13"]),
        (lambda c: c["instruction"].update(template="alpacca"), ['template: "alpacca"', "'alpaca'"]),
        (
            lambda c: c["instruction"]["pairs"].update(x={"path": "a.json", "dataset": "b"}),
            ["pairs.x:", "expected exactly one of", "`dataset`"],
        ),
        (
            lambda c: c["instruction"]["pairs"].update(x={"path": "a.json", "split": "test"}),
            ["pairs.x: split: nothing reads it next to `path`"],
        ),
        (lambda c: pair(c, revision="main"), ["pairs.translation: revision", "next to `source`"]),
        (
            lambda c: c["instruction"]["pairs"]["command-option"].update(directions=["ja-en"]),
            ["pairs.command-option.directions", "only the pairs `translation`"],
        ),
        (
            lambda c: preference(c, pairs={"x": {"path": "a.json", "revision": "v1"}}),
            ["preference.json: pairs.x: revision", "next to `path`"],
        ),
        (lambda c: preference(c, pairs={}), ["preference.json: pairs: empty", "delete the file"]),
        (lambda c: preference(c, pairs={"x": {"source": "tatoeba"}}), ["pairs.x: source: unknown key"]),
        (lambda c: preference(c, beta=0), ["beta: 0"]),
        (lambda c: preference(c, loss_type="sigmoide"), ['loss_type: "sigmoide"', "Did you mean 'sigmoid'"]),
        (lambda c: preference(c, label_smoothing=0.5), ["label_smoothing: 0.5", "below 0.5"]),
        (lambda c: preference(c, loss_type="exo_pair"), ["label_smoothing: 0", "exo_pair"]),
        (
            lambda c: preference(c, label_smoothing=0.1),
            ["label_smoothing: 0.1", "loss_type sigmoid does not read it", "exo_pair, robust, aot"],
        ),
        (lambda c: preference(c, loss_type="sft", beta=0.1), ["beta: 0.1", "loss_type sft does not read it"]),
        (
            lambda c: preference(c, lora={"r": 2, "lora_dropout": 0.1}),
            ["preference.json: lora: lora_dropout: 0.1", "without any dropout"],
        ),
        (
            lambda c: (preference(c), c["preference"].pop("learning_rate")),
            ["preference.json: learning_rate: missing"],
        ),
        (
            lambda c: (
                c["model"].update(tie_word_embeddings=False),
                preference(c, lora={"r": 2, "target_modules": ["q_proj", "lm_head"]}),
            ),
            ['preference.json: lora.target_modules: "lm_head" takes lm_head', "without an adapter"],
        ),
        (
            lambda c: (
                c["model"].update(tie_word_embeddings=False),
                preference(c, lora={"r": 2, "target_modules": ".*(q_proj|lm_head)"}),
            ),
            ["preference.json: lora.target_modules", "takes lm_head", "without an adapter"],
        ),
        (lambda c: c["instruction"].update(translation_share=1.5), ["translation_share: 1.5", "0 to 1"]),
        (lambda c: pair(c, directions=[{}]), ["directions: [{}]", "ja-en or en-ja"]),
        (lambda c: preference(c, bta=0.1), ["'beta'"]),
    ],
)
def test_a_fault_is_named_with_the_way_out(change, words):
    message = refusal(change)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("loss", ["exo_pair", "robust", "aot", "aot_unpaired"])
def test_label_smoothing_is_accepted_where_it_is_read(loss):
    values = tiny()
    preference(values, loss_type=loss, label_smoothing=0.1, lora={"r": 2, "lora_dropout": 0.0})
    check_recipe(values, "configs/x")


def test_preference_is_an_optional_file_and_its_model_the_last():
    values = tiny()
    assert training.tuned_stage(values) == "12_finetune"
    preference(values)
    check_recipe(values, "configs/x")
    assert training.tuned_stage(values) == "13_preference"
