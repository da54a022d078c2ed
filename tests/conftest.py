"""Fixtures: a byte-level tokenizer with Qwen markup and tiny random models, so that no test needs
a download."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import pytest
import torch

torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "slow: not in the fast part of the suite (bash tests/run.sh -m 'not slow')")
    config.addinivalue_line(
        "markers", "faults: the long fault suite, run by bash tests/run.sh --faults alone")


@pytest.hookimpl(tryfirst=True)           # before -m is applied
def pytest_collection_modifyitems(config, items):
    """What uses a vLLM engine is slow (it takes twenty seconds to start); the fault suite runs when
    asked for."""
    for item in items:
        if "vllm_engine" in item.fixturenames:
            item.add_marker(pytest.mark.slow)
    if "faults" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("faults")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


CHAT_TEMPLATE = ("{% for m in messages %}"
                 "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
                 "{% endfor %}"
                 "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def byte_tokenizer():
    """256 bytes and the Qwen special tokens: encodes any text exactly."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|endoftext|>", pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE)


def make_model(path, kind="qwen2", seed=0, tie=True, positions=2048, **changes):
    """Save a random model and the byte tokenizer to `path`: hidden 64, 2 layers, 2 heads of 32
    sharing one key head."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
    config_class, model_class = {"qwen2": (Qwen2Config, Qwen2ForCausalLM),
                                 "llama": (LlamaConfig, LlamaForCausalLM)}[kind]
    tokenizer = byte_tokenizer()
    sizes = dict(vocab_size=264, hidden_size=64, intermediate_size=128,
                 num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                 max_position_embeddings=positions, tie_word_embeddings=tie,
                 bos_token_id=None, eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
                 initializer_range=0.1)
    torch.manual_seed(seed)
    model = model_class(config_class(**{**sizes, **changes}))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("tiny"))
