"""Stage 16: the model folder, its card, and the upload to a local server with the hub's protocol."""

import base64
import http.server
import json
import re
import threading

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer


def test_the_folder_loads_and_is_the_tuned_model(project):
    folder = project.output("mini", "16_export", ".")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "山は?"}], return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=2).shape[1] > ids["input_ids"].shape[1]
    assert project.digest("mini", "16_export") == project.digest("mini", "12_finetune")
    for stage in ("05_pretrain", "12_finetune"):
        assert (folder / f"{stage}.png").read_bytes().startswith(b"\x89PNG")


def test_every_folder_is_saved_for_transformers_4_too(project):
    for stage in ("03_tokenizer", "05_pretrain", "12_finetune", "16_export"):
        tokenizer = json.loads(project.output("mini", stage, "tokenizer_config.json").read_text())
        assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast", stage
        assert stage == "03_tokenizer" or (
            json.loads(project.output("mini", stage, "config.json").read_text())["rope_theta"] == 10_000
        ), stage


def test_the_card_says_what_was_measured(project):
    card = project.output("mini", "16_export", "README.md").read_text("utf-8")
    head = yaml.safe_load(card.split("---")[1])
    assert head == {"language": "ja", "library_name": "transformers", "pipeline_tag": "text-generation"}
    funnel = project.figures("mini", "02_dataset")["text"]["documents"]
    assert re.search(rf"\| text \| yours.*\| {funnel['in']:,} \| {funnel['out']:,} \|", card)
    trained = project.figures("mini", "05_pretrain")
    assert (
        f"{trained['active']['parameters']:,} parameters" in card and f"{trained['tokens']:,} tokens" in card
    )
    bits = project.figures("mini", "06_evaluate")["in_domain"]["bits_per_byte"]
    assert f"{bits:.3f}" in card
    assert project.output("mini", "07_generate", "samples.md").read_text("utf-8").strip() in card
    assert '"learning_rate": 0.01' in card and "](05_pretrain.png)" in card and "](12_finetune.png)" in card
    pairs = project.figures("mini", "11_dataset")["pairs"]["mine"]
    assert f"| mine | pairs.json | yours | {pairs['in']} | {pairs['out']} | none |" in card
    assert "AutoModelForCausalLM.from_pretrained('.')" in card  # the folder of the card, before any upload
    assert "In questions, write kana full-width" in card and "Normalise your prompts" not in card
    assert str(project.folder) not in card  # nobody's paths are published


class Hub(http.server.BaseHTTPRequestHandler):
    """The five calls of an upload, answered as the hub does; the commit contains every file."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.calls.append((self.path, self.headers["Authorization"], body))
        if self.headers["Authorization"] != "Bearer good":
            return self.answer(401, {"error": "Invalid username or password."})
        if self.path.endswith("/preupload/main"):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        url = f"http://127.0.0.1:{self.server.server_port}/me/model"
        return self.answer(200, {"url": url, "commitUrl": f"{url}/commit/abc", "commitOid": "abc"})

    def do_GET(self):
        if self.path == "/api/models/me/model":
            return self.answer(200, {"id": "me/model", "private": True})
        return self.answer(404, {"error": "Entry not found"})

    def answer(self, status, value):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.calls = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_nothing_is_pushed_unless_asked_for_and_then_the_folder_is(project, hub, monkeypatch):
    monkeypatch.setitem(project.environment, "HF_ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
    monkeypatch.setitem(project.environment, "HF_TOKEN", "bad")
    stage = ("fine-tuning/16_export.py", "--recipe", "mini", "--force")
    project.run(*stage)
    assert hub.calls == []
    options = ("--set", "finetune.push_to_hub=true")
    result = project.run(*stage, *options, check=False)
    assert result.returncode == 2 and "push_to_hub: it needs hub_model_id" in result.stderr
    options += ("--set", "finetune.hub_model_id=me/model")
    result = project.run(*stage, *options, check=False)
    assert result.returncode == 1 and "push to 'me/model' failed" in result.stderr
    assert "hf auth login" in result.stderr

    hub.calls.clear()
    monkeypatch.setitem(project.environment, "HF_TOKEN", "good")
    result = project.run(*stage, *options)
    assert "/me/model/commit/abc" in result.stdout
    created = json.loads(hub.calls[0][2])
    assert created["visibility"] == "private" and hub.calls[0][0] == "/api/repos/create"
    lines = [json.loads(line) for line in hub.calls[-1][2].splitlines()]
    sent = {line["value"]["path"]: line["value"]["content"] for line in lines if line["key"] == "file"}
    folder = project.output("mini", "16_export", ".")
    kept = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "stage.json"}
    assert {path: base64.b64decode(content) for path, content in sent.items()} == kept
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= sent.keys()
    project.run(*stage)  # back to what the other tests expect
