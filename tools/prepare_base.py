"""A base model made ready for long chains of thought: the same weights in a new directory.

    python -m tools.prepare_base --model Qwen/Qwen2.5-Math-1.5B --out runs/paper_1.5b/base

What changes (docs/PAPER.md, "Base model preparation"):
    positions   `max_position_embeddings` and the base of the rotary embedding, if the model has
                fewer positions than wanted; one that has them keeps both
    template    Qwen's markup without a default system prompt
    generation  stops on both <|endoftext|> and <|im_end|>

The directory is written beside and renamed, its sidecar (base.meta.json) with it.
"""

import common  # first: installs signal handlers, so that Ctrl-C is one line, no traceback

import filecmp
import json
import os
import shutil
from pathlib import Path

from common import die
from model import check_model_dir, load_tokenizer, stop_ids, weight_files

# Qwen's markup without a default system prompt: what the model is told is what the data say.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
COPIED = (".json", ".safetensors", ".txt", ".model")   # weights, their index, the tokenizer's files


# --------------------------------------------------------------------------------- reading the base


def find_base(model):
    """A local directory as it is; a hub id is downloaded. -> Path"""
    path = Path(model)
    if not path.is_dir():
        from huggingface_hub import snapshot_download
        files = [f"*{suffix}" for suffix in COPIED]
        try:
            path = Path(snapshot_download(model, allow_patterns=files))
        except (OSError, ValueError) as error:
            die(f"{model} cannot be loaded: {str(error).splitlines()[0]}")
    if not (path / "config.json").exists():
        die(f"{path} is no model: config.json is missing")
    return path


def read_json(path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        die(f"{path} cannot be read: {error}")


def check_base(path, config):
    """Refuse what is no whole model, what the stages cannot run, and a tied layer of its own."""
    check_model_dir(path, renders=False)                  # the chat template is replaced
    if config.get("use_sliding_window"):
        die(f"{path} uses sliding-window attention, which the packed attention does not implement")
    if config.get("tie_word_embeddings"):
        embedding = read_tensor(path, "model.embed_tokens.weight")
        output = read_tensor(path, "lm_head.weight")
        if embedding is None or (output is not None and not output.equal(embedding)):
            die(f"{path}: tie_word_embeddings is true, but lm_head.weight differs from it")


def read_tensor(path, name):
    """A tensor of the safetensors files by its name, None if it is in none."""
    from safetensors import safe_open
    for file in weight_files(path):
        with safe_open(file, "pt") as tensors:
            if name in tensors.keys():
                return tensors.get_tensor(name)
    return None


# ---------------------------------------------------------------------------------- what is changed


def extend_positions(args, path, config):
    """The configuration with the positions wanted; one that has them stays. -> (dict, a line)"""
    has = config.get("max_position_embeddings", 0)
    if has >= args.positions:
        return config, f"the base has {has} positions: these and its rope are kept"
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        die(f"{path} scales its rotary embedding ({rope}): a base with plain RoPE is expected")
    extended = {**config, "max_position_embeddings": args.positions}
    if "rope_parameters" in config:
        extended["rope_parameters"] = {**rope, "rope_theta": args.rope_theta}
    else:
        extended["rope_theta"] = args.rope_theta
    return extended, f"rope_theta {args.rope_theta:g}, {has} -> {args.positions} positions"


def changed_files(path, config, tokenizer):
    """{file name: text} of the files that are not copied."""
    stops = stop_ids(tokenizer)
    generation = {"eos_token_id": stops, "pad_token_id": stops[1]}
    tokenizer_config = read_json(path / "tokenizer_config.json")
    tokenizer_config["chat_template"] = CHAT_TEMPLATE
    tokenizer_config["model_max_length"] = config["max_position_embeddings"]
    bodies = {"config.json": config, "generation_config.json": generation,
              "tokenizer_config.json": tokenizer_config}
    texts = {}
    for name, body in bodies.items():
        texts[name] = json.dumps(body, indent=2, ensure_ascii=False) + "\n"
    return texts


def copied_files(path, changed):
    files = [file for file in path.iterdir() if file.is_file() and file.suffix in COPIED]
    return [file for file in files if file.name not in changed and not file.name.startswith(".")
            and not file.name.endswith(".meta.json")]


# ------------------------------------------------------------------------------------------ writing


def is_prepared(out, changed, copied):
    """Does `out` hold just these files?"""
    for name, text in changed.items():
        if not (out / name).exists() or (out / name).read_text() != text:
            return False
    for file in copied:
        if not (out / file.name).exists() or not filecmp.cmp(file, out / file.name, shallow=False):
            return False
    return True


def write_base(args, path, temporary, out, changed, copied):
    """All files and the sidecar, written beside and renamed."""
    common.make_dir(temporary)
    try:
        for file in copied:
            shutil.copyfile(file, temporary / file.name)
        for name, text in changed.items():
            (temporary / name).write_text(text)
        common.write_meta(temporary / "base", "base", args, [path / "config.json"])
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def prepare(args):
    path, out = find_base(args.model), Path(args.out)
    common.lock(out)
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)         # what a killed run left
    config = read_json(path / "config.json")
    tokenizer = load_tokenizer(path)
    check_base(path, config)
    config, what = extend_positions(args, path, config)
    changed = changed_files(path, config, tokenizer)
    copied = copied_files(path, changed)
    if not out.exists():
        write_base(args, path, temporary, out, changed, copied)
        print(f"{out}: {what}; no system prompt, stops on {stop_ids(tokenizer)}; weights unchanged",
              flush=True)
    elif is_prepared(out, changed, copied):
        print(f"{out}: already prepared, nothing written ({what})", flush=True)
    else:
        die(f"{out} exists and is not {args.model} prepared with these settings; remove it or "
            "choose another --out")


def parse_args(argv=None):
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, help="directory or hub id")
    add("--rope-theta", type=float, default=1e6, help="base of the rotary embedding's wave lengths")
    add("--positions", type=int, default=40000, help="max_position_embeddings, tokens")
    add("--out", required=True, metavar="DIR", help="new model directory")
    args = common.parse_args(parser, "prepare-base", argv)
    common.check_range(args, positions=1, rope_theta=1)
    return args


def main(argv=None):
    args = parse_args(argv)
    if os.environ.get("RANK", "0") == "0":                    # of several ranks one writes
        prepare(args)


if __name__ == "__main__":
    common.run(main)
