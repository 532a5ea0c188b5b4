"""Which keys make a stage stale."""

from recipe.config import staleness


def test_keys_that_decide_nothing_are_left_out():
    kept = staleness.deciding_keys("pretrain", {"logging_steps": 1, "report_to": "none", "learning_rate": 1})
    assert kept == {"learning_rate": 1}
    memory = {
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "activation_checkpointing_kwargs": {},
        "save_steps": 5,
    }
    assert staleness.deciding_keys("pretrain", memory | {"global_batch_size": 8}) == {"global_batch_size": 8}
    # In a training file null is the same as no key, but in spikes it switches the rule off.
    nulls = {"lora": None, "muon_learning_rate": None, "spikes": None}
    assert staleness.deciding_keys("finetune", nulls) == {"spikes": None}
    assert staleness.deciding_keys("dataset", {"sources": {}, "minhash": None})["minhash"] is None
    assert staleness.deciding_keys("tokenizer", {"bos_token": None}) == {"bos_token": None}
    # A weight is for training and the tokenizer to ask for: ten hours of data are not redone for it.
    assert staleness.deciding_keys("dataset", {"sources": {"a": {"weight": 2}}})["sources"] == {"a": {}}


def test_a_download_depends_on_the_sources_alone():
    dataset = {"sources": {"a": {"weight": 2}}, "valid_share": 0.1}
    assert staleness.deciding_config("01_download", {"dataset": dataset}) == {
        "dataset": {"sources": {"a": {}}}
    }
    assert staleness.deciding_config("02_dataset", {"dataset": dataset})["dataset"]["valid_share"] == 0.1


def test_a_source_may_have_any_name_and_the_order_of_sources_decides():
    values = {"sources": {"project": {"source": "files", "rules": "web"}, "log_a": {"weight": 2.0}}}
    kept = staleness.deciding_keys("dataset", values)
    assert kept["sources"] == {"project": {"source": "files", "rules": "web"}, "log_a": {}}
    turned = {"sources": dict(reversed(values["sources"].items()))}
    assert kept != staleness.deciding_keys("dataset", turned)


def test_a_stage_ignores_what_it_does_not_read_also_in_the_record_of_an_earlier_release():
    generation = {"prompts": ["a"], "questions": ["b"], "max_new_tokens": 8}
    kept = {
        stage: list(staleness.deciding_config(stage, {"generation": generation})["generation"])
        for stage in ("07_generate", "14_evaluate", "15_generate")
    }
    assert kept == {
        "07_generate": ["prompts", "max_new_tokens"],
        "14_evaluate": ["max_new_tokens"],
        "15_generate": ["questions", "max_new_tokens"],
    }
    assert staleness.deciding_keys("tokenizer", {"vocab_size": 400, "compare": []}) == {"vocab_size": 400}
    recorded = {"sources": {"b": {"licence": "MIT"}, "a": {}}, "order": ["b", "a"]}
    now = staleness.deciding_keys("dataset", {"sources": {"b": {"licence": "CC0"}, "a": {}}})
    assert staleness.deciding_keys("dataset", recorded) == now
