"""A model directory whose files do not belong together is one sentence, before anything is
loaded."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import make_model
from model import check_model_dir, load_config, load_model, load_tokenizer

WEIGHTS = "model.safetensors"


def change_config(**changes):
    def change(path):
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, **changes}))
    return change


def change_weights(name, tensor):
    """None: the tensor is gone."""
    def change(path):
        weights = load_file(path / WEIGHTS)
        weights.pop(name, None)
        if tensor is not None:
            weights[name] = tensor
        save_file(weights, path / WEIGHTS, {"format": "pt"})
    return change


def replace(name, content):
    """None: the file is gone."""
    def change(path):
        (path / name).unlink(missing_ok=True)
        if content is not None:
            (path / name).write_bytes(content)
    return change


def cut(path):
    content = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(content[:len(content) // 2])


def template(text):
    def change(path):
        config = json.loads((path / "tokenizer_config.json").read_text())
        config.pop("chat_template", None)
        (path / "tokenizer_config.json").write_text(json.dumps(config))
        replace("chat_template.jinja", text and text.encode())(path)
    return change


ENDLESS = ("{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
           "{% endfor %}{% endfor %}{% endfor %}")
EMBEDDING = "model.embed_tokens.weight"
LAYER = "model.layers.1.mlp.up_proj.weight"
CASES = {
    "more layers than weights": (change_config(num_hidden_layers=5, layer_types=None),
                                 "the weights lack model.layers.2."),
    "fewer layers than weights": (change_config(num_hidden_layers=1, layer_types=None),
                                  "config.json has no parameter model.layers.1."),
    "a layer missing": (change_weights(LAYER, None), f"the weights lack {LAYER} (1 of "),
    "an unknown tensor": (change_weights("model.extra", torch.zeros(1)),
                          "config.json has no parameter model.extra"),
    "another hidden size": (change_config(hidden_size=32), "config.json makes it"),
    "another vocabulary": (change_config(vocab_size=300),
                           f"{EMBEDDING} is [264, 64], config.json makes it [300, 64]"),
    "NaN": (change_weights(LAYER, torch.full((128, 64), torch.nan)),
            f"{LAYER} has numbers that are not finite"),
    "untied without an output layer": (change_config(tie_word_embeddings=False),
                                       "the weights lack lm_head.weight"),
    "another architecture": (change_config(model_type="bert"), "config.json has no parameter"),
    "a picture's model": (change_config(model_type="vit"), "config.json describes no causal LM"),
    "layers by words": (change_config(num_hidden_layers="two"), "config"),
    "no configuration": (replace("config.json", None),
                         "neither config.json nor final/config.json is there"),
    "no JSON": (replace("config.json", b"{"), "cannot read a model configuration"),
    "no weights": (replace(WEIGHTS, None), "has no weights: model.safetensors is missing"),
    "empty weights": (replace(WEIGHTS, b""), "model.safetensors is not whole"),
    "garbage": (replace(WEIGHTS, b"x" * 5000), "model.safetensors is not whole"),
    "half of the weights": (cut, "model.safetensors is not whole"),
    "an index of nothing": (replace(f"{WEIGHTS}.index.json", b"[]"), "is no index of weight files"),
    "an index of a file that is gone": (
        replace(f"{WEIGHTS}.index.json", b'{"weight_map": {"a": "x.safetensors"}}'),
        "x.safetensors is missing"),
    "no chat template": (template(None), "has no chat template"),
    "a template that does not end": (template(ENDLESS), "the chat template fails: it does not end"),
    "a template out of range": (template("{% for a in range(10**9) %}{% endfor %}"),
                                "the chat template fails: Range too big"),
    "a broken template": (template("{% for %}"), "the chat template fails"),
    "a template without the problem": (template("hello"), "the chat template makes"),
    "a template that reaches for the system": (template("{{ ''.__class__.__mro__ }}"),
                                               "the chat template"),
}


@pytest.mark.parametrize("name", CASES)
def test_files_that_do_not_belong_together(tiny_model_dir, tmp_path, monkeypatch, capsys, name):
    path = tmp_path / "model"
    shutil.copytree(tiny_model_dir, path)
    change, sentence = CASES[name]
    change(path)
    monkeypatch.setattr("model.check_chat_template.__defaults__", (1,))       # seconds
    with pytest.raises(SystemExit) as stop:
        check_model_dir(path)
    said = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert said[-1].startswith("error: ") and sentence in said[-1]
    assert str(path) in said[-1]
    assert not any("Traceback" in line for line in said)


def test_a_tokenizer_with_more_tokens_than_the_embedding_has_rows(tmp_path, capsys):
    make_model(tmp_path, vocab_size=256)
    with pytest.raises(SystemExit):
        check_model_dir(tmp_path)
    assert "the tokenizer has 259 tokens, the embedding 256 rows" in capsys.readouterr().err


@pytest.mark.parametrize("kind, tie", [("qwen2", True), ("qwen2", False), ("llama", False)])
def test_whole_models_pass(tmp_path, kind, tie):
    check_model_dir(make_model(tmp_path, kind, tie=tie))
    if tie:
        # the tied output layer may be stored too
        change_weights("lm_head.weight", load_file(tmp_path / WEIGHTS)[EMBEDDING].clone())(tmp_path)
        check_model_dir(tmp_path)
    load_model(tmp_path)
    template(None)(tmp_path)
    check_model_dir(tmp_path, renders=False)


def test_what_transformers_would_make_up_is_refused_when_a_model_is_loaded(
        tiny_model_dir, tmp_path, capsys):
    """A hub id has no directory to look at before: the names are those that were found."""
    path = tmp_path / "model"
    shutil.copytree(tiny_model_dir, path)
    change_weights(LAYER, None)(path)
    with pytest.raises(SystemExit):
        load_model(path)
    assert f"missing keys in the weights: ['{LAYER}']" in capsys.readouterr().err


def test_the_shipped_bases_and_hub_ids_pass():
    for path in ("toy/base", "toy/base_easy", "some/hub-id"):
        check_model_dir(path)


@pytest.mark.parametrize("load", [load_config, load_tokenizer, check_model_dir])
def test_no_code_of_a_model_is_run(tiny_model_dir, tmp_path, monkeypatch, load):
    """transformers would ask on standard input, and run it after a `y`."""
    path = tmp_path / "model"
    shutil.copytree(tiny_model_dir, path)
    ours = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    (path / "theirs.py").write_text(ours)
    classes = {"AutoConfig": "theirs.Config",
               "AutoModelForCausalLM": "theirs.Model",
               "AutoTokenizer": ["theirs.Tokenizer", None]}
    change_config(auto_map=classes, model_type="theirs")(path)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    try:
        load(path)
    except SystemExit as stop:
        assert stop.code == 2
    assert not (tmp_path / "ran").exists()
