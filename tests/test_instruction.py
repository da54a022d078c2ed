"""The instruction is data: one text for all stages of a run, in every sidecar, and a model is held
to the one it was trained with."""

import importlib
import json

import pytest

import common
from model import INSTRUCTION, check_instruction, load_tokenizer, render_prompt

STAGES = {name: importlib.import_module(name) for name in
          ("01_sample", "02_verify_score", "03_train_oxa", "04_rlvr", "05_eval")}
OTHER = "\nAnswer within \\boxed{}, please."


def run(capsys, stage, *args, ok=True):
    capsys.readouterr()
    if ok:
        STAGES[stage].main([str(a) for a in args])
    else:
        with pytest.raises(SystemExit) as stop:
            STAGES[stage].main([str(a) for a in args])
        assert stop.value.code == 2
    printed = capsys.readouterr()
    return printed.out + printed.err


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def data(tmp_path):
    """Problems, verified samples and a training set of four rows, and a recipe with an
    instruction."""
    problems = [{"pid": f"p{i}", "problem": f"{i}+1?", "answer": "1", "source": "s"}
                for i in range(4)]
    rows = [{**row,
             "sid": f"{row['pid']}:t:0",
             "response": "<think>x</think>\\boxed{1}",
             "n_tokens": 26,
             "ppl": 2.0,
             "finish": "stop",
             "correct": True,
             "status": "ok",
             "objective": "ce"} for row in problems]
    write(tmp_path / "problems.jsonl", problems)
    write(tmp_path / "rows.jsonl", rows)
    (tmp_path / "r.toml").write_text(f"[run]\ninstruction = {json.dumps(OTHER)}\n")
    return tmp_path


def sidecar(path):
    return common.read_meta(path)["args"]["instruction"]


def test_the_prompt_is_problem_and_instruction(tiny_model_dir):
    tokenizer = load_tokenizer(tiny_model_dir)
    for given, text in (((), INSTRUCTION), ((OTHER,), OTHER)):
        prompt = tokenizer.decode(render_prompt(tokenizer, "1+1?", *given))
        assert prompt == f"<|im_start|>user\n1+1?{text}<|im_end|>\n<|im_start|>assistant\n"
    # a base was trained with none
    check_instruction(tiny_model_dir, "whatever")


def test_a_trained_model_is_held_to_its_instruction(data, tiny_model_dir, capsys):
    """Trained by 03 with the recipe's; 01, 02, 03, 04 and 05 refuse ours with that model, and take
    the recipe's."""
    recipe = ["--recipe", data / "r.toml"]
    trained = data / "sft"
    sft = ["--data", data / "rows.jsonl", "--ce-per-step", 4, "--epochs", 1,
           "--max-tokens", 500, "--token-budget", 2048]
    run(capsys, "03_train_oxa", *recipe, "--model", tiny_model_dir, "--out", trained, *sft)
    assert json.loads(
        (trained / "final" / "instruction.json").read_text()) == {"instruction": OTHER}
    assert sidecar(trained / "metrics.jsonl") == OTHER
    said = run(capsys, "03_train_oxa", "--model", tiny_model_dir, "--out", trained, *sft, ok=False)
    assert "other settings (instruction)" in said

    problems = ["--problems", data / "problems.jsonl"]
    hf = ["--engine", "hf", "--model", trained]
    commands = {
        "01_sample": ["model", *problems, *hf, "--n", 1, "--max-tokens", 4],
        "02_verify_score": ["score", "--samples", data / "rows.jsonl", "--model", trained,
                            "--ppl-context", "prompt"],
        "03_train_oxa": ["--model", trained, *sft],
        "04_rlvr": [*problems, *hf, "--prompts-per-step", 4, "--rollouts", 2, "--max-steps", 1,
                    "--max-response-tokens", 4, "--token-budget", 1024],
        "05_eval": [*problems, *hf, "--n", 1, "--max-tokens", 4, "--entropy-samples", 0],
    }
    for stage, args in commands.items():
        said = run(capsys, stage, *args, "--out", data / f"ours_{stage}.jsonl", ok=False)
        assert f"was trained with the instruction {OTHER!r}" in said, stage
        assert "--instruction, or as [run] instruction" in said
    for stage in ("01_sample", "02_verify_score"):
        run(capsys, stage, *commands[stage], *recipe, "--out", data / f"{stage}.jsonl")
        assert sidecar(data / f"{stage}.jsonl") == OTHER
    run(capsys, "05_eval", *commands["05_eval"], "--instruction", OTHER, "--out", data / "eval")
    assert sidecar(data / "eval" / "problems.jsonl") == OTHER
    assert json.loads((data / "eval" / "results.json").read_text())["instruction"] == OTHER


def test_a_checkpoint_that_does_not_name_its_instruction_is_refused(data, tiny_model_dir, capsys):
    import shutil
    broken = data / "broken"
    shutil.copytree(tiny_model_dir, broken)
    for text in ("[]", "{", '{"other": 1}'):
        (broken / "instruction.json").write_text(text)
        with pytest.raises(SystemExit):
            check_instruction(broken, OTHER)
        assert "does not name an instruction" in capsys.readouterr().err
