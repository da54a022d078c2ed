"""What tests/gpu.sh runs on a GPU: each line that only a GPU reaches, against what is known.

    bash tests/gpu.sh                             on a GPU
    python tests/gpu_checks.py --on-cpu           the same checks on a CPU, as far as they go there

A check returns (predicted, seen, passed); passed None: told, not judged. A failed or broken check
does not keep the others from running. Predictions of memory and time are tools/trace.py's.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402  first of ours: Ctrl-C is one line

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import shutil
import subprocess
import tempfile
import time
import traceback

import torch

from model import (
    OutputLayer, TokenLogprobs, clip_gradient, halve_linear, load_model, pack_sequences,
    packed_attention, token_logprobs)
from tools import roofline
from tools.sizes import KNOWN

BASE = ROOT / "toy" / "base"
LEAST = {"torch": (2, 11), "transformers": (5, 17)}
BIG = "Qwen2.5-Math-1.5B"


def version_of(package: str) -> tuple[int, ...]:
    text = importlib.metadata.version(package).split("+")[0]
    return tuple(int(part) for part in text.split(".")[:2])


def gap(a, b) -> float:
    """Distance of b from a, relative to a."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).norm() / a.norm())


# ------------------------------------------------------------------------ attention, types, layers


def versions(device):
    seen = {name: version_of(name) for name in LEAST}
    passed = all(seen[name] >= least for name, least in LEAST.items())
    told = ", ".join(f"{name} {'.'.join(map(str, v))}" for name, v in seen.items())
    vllm = "vLLM is installed" if importlib.util.find_spec("vllm") else "no vLLM"
    card = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return "torch 2.11, transformers 5.17 or later", f"{told}, {vllm}, {card}", passed


def some_sequences(share: bool):
    """Random sequences; with `share` three answers to each of four prompts."""
    generator = torch.Generator().manual_seed(0)
    sequences = []
    for n in (5, 33, 128, 300):
        prompt = torch.randint(0, 80, (n,), generator=generator).tolist()
        for size in (1, 17, 64) if share else (40,):
            answer = torch.randint(0, 80, (size,), generator=generator).tolist()
            sequences.append((prompt + answer, n))
    return sequences


def plain_attention(query, key, value, scaling, pack):
    """[E, heads, D], float64, a loop over sequences and heads: softmax(q k' scaling) v, causal."""
    out = torch.empty_like(query)
    group = query.shape[1] // key.shape[1]
    borders = pack.cu_seqlens.tolist()
    for begin, end in zip(borders, borders[1:]):
        mask = torch.full((end - begin, end - begin), -torch.inf).double().triu(1)
        for head in range(query.shape[1]):
            q = query[begin:end, head]
            k, v = key[begin:end, head // group], value[begin:end, head // group]
            out[begin:end, head] = (q @ k.T * scaling + mask).softmax(-1) @ v
    return out


def attention(device, share: bool):
    """Forward and backward of `packed_attention` against the plain loop, from the same numbers."""
    pack = pack_sequences(some_sequences(share), device, share=share)
    host = pack_sequences(some_sequences(share), "cpu", share=share)
    generator = torch.Generator().manual_seed(1)
    n_rows, dim = len(pack.input_ids), 64
    leaves = []
    for heads in (6, 2, 2):
        x = torch.randn(1, heads, n_rows, dim, generator=generator).bfloat16().float()
        leaves.append(x)
    here = [x.to(device, copy=True).requires_grad_() for x in leaves]
    out = packed_attention(None, *here, scaling=dim ** -0.5, pack=pack)[0][0]      # [T, Hq, D]
    plain = [x.double().requires_grad_() for x in leaves]
    laid = [host.spread(x[0].transpose(0, 1)) for x in plain]                      # [E, heads, D]
    expected = plain_attention(*laid, dim ** -0.5, host)
    if host.owner is not None:
        expected = expected[host.owner]
    weight = torch.randn(expected.shape, generator=generator)
    (out.float() * weight.to(device)).sum().backward()
    (expected * weight.double()).sum().backward()
    limit = 2e-2 if device == "cuda" else 1e-5
    gaps = [gap(expected, out)] + [gap(b.grad, a.grad) for a, b in zip(here, plain)]
    seen = f"forward {gaps[0]:.1e}, gradients of q, k, v {max(gaps[1:]):.1e}"
    return f"relative gap under {limit:.0e}", seen, max(gaps) < limit


def primitive(device):
    """Log-probs and gradients of toy/base here, against float32 on the host."""
    found = {}
    for place in ("cpu", device):
        model = load_model(BASE, device=place, trainable=True)
        pack = pack_sequences(some_sequences(True), place, share=True)
        logp, entropy = token_logprobs(model, pack, 0.85, entropy=True)
        (-logp.mean()).backward()
        gradient = torch.cat([p.grad.flatten().cpu() for p in model.parameters()])
        found[place] = logp.detach().cpu(), entropy.cpu(), gradient
        if any(p.dtype != torch.float32 or p.grad.dtype != torch.float32
               for p in model.parameters()):
            return "float32 weights and gradients", "another type", False
    logp, entropy, gradient = found["cpu"]
    logp_here, entropy_here, gradient_here = found[device]
    limit = 2e-2 if device == "cuda" else 1e-9
    mean = float((logp - logp_here).abs().mean())
    apart = gap(gradient, gradient_here)
    seen = (f"logp {mean:.1e}, entropy {float((entropy - entropy_here).abs().mean()):.1e}, "
            f"gradient {apart:.1e}")
    return f"mean gap under {limit:.0e}, gradient 5e-2", seen, mean <= limit and apart < 5e-2


def output_layer(device):
    """OutputLayer in bf16, chunked, against float64 log_softmax of the same bf16 numbers."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(600, 256, generator=generator).bfloat16()
    weight = (0.2 * torch.randn(4000, 256, generator=generator)).bfloat16().float()
    targets = torch.randint(0, 4000, (600,), generator=generator)
    h = hidden.to(device, copy=True).requires_grad_()
    w = weight.to(device, copy=True).requires_grad_()
    logp, entropy = OutputLayer.apply(h, w, targets.to(device), 0.85, True)
    logp.mean().backward()
    h64, w64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
    table = (h64 @ w64.T / 0.85).log_softmax(-1)
    expected = table[torch.arange(600), targets]
    expected.mean().backward()
    expected_entropy = -(table.exp() * table).sum(-1)
    gaps = {"logp": gap(expected, logp), "entropy": gap(expected_entropy, entropy),
            "d hidden": gap(h64.grad, h.grad), "d weight": gap(w64.grad, w.grad)}
    seen = ", ".join(f"{name} {value:.1e}" for name, value in gaps.items())
    return "relative gaps under 1e-2", seen, max(gaps.values()) < 1e-2


def frozen(device):
    """bf16 linear layers under autocast: the very numbers of float32 weights under autocast."""
    pack = pack_sequences(some_sequences(False), device)
    model = load_model(BASE, device="cpu").to(device)         # float32: as a trainable one is
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        before = model.model(input_ids=pack.input_ids[None], position_ids=pack.position_ids[None],
                             pack=pack, use_cache=False).last_hidden_state
        halve_linear(model)
        after = model.model(input_ids=pack.input_ids[None], position_ids=pack.position_ids[None],
                            pack=pack, use_cache=False).last_hidden_state
    return "the same bits", f"largest difference {float((before - after).abs().max()):.1e}", \
        torch.equal(before, after)


# ----------------------------------------------------------------------------- a step at full size


def random_model(name: str, device):
    """The model of these sizes with random weights, float32."""
    from transformers import AttentionInterface, AutoModelForCausalLM, Qwen2Config
    AttentionInterface.register("packed", packed_attention)
    load_model(BASE)                                           # registers the mask too
    sizes = KNOWN[name]
    config = Qwen2Config(
        vocab_size=sizes.vocab, hidden_size=sizes.hidden, intermediate_size=sizes.inter,
        num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads, tie_word_embeddings=sizes.tied,
        max_position_embeddings=40000)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, attn_implementation="packed").train()


def one_step(model, optimizer, tokens: int, device) -> float:
    """Seconds of a step on one sequence; raises if its loss or gradient is not finite."""
    start = time.perf_counter()
    pack = pack_sequences([([k % 80 for k in range(tokens)], 150)], device)
    logp, _ = TokenLogprobs(model)(pack)
    (-logp.mean()).backward()
    norm = clip_gradient(model, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    assert norm == norm and norm < float("inf"), f"gradient norm {norm}"
    return time.perf_counter() - start


def full_step(device):
    """SFT on a random 1.5B with checkpointing at 32k tokens: peak memory and tokens/s."""
    if device == "cpu":
        model = load_model(BASE, trainable=True)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        seconds = [one_step(model, optimizer, 400, device) for _ in range(2)]
        return "nothing, for toy/base", f"{400 / seconds[1]:,.0f} tokens/s on a CPU", None
    tokens = 32768
    card = torch.cuda.get_device_properties(0).total_memory
    pack = roofline.traced_pack(KNOWN[BIG], "ddp", True, tokens, 8)
    while sum(pack["memory"].values()) - pack["memory"]["DDP buckets"] > 0.93 * card:
        tokens //= 2
        if tokens < 2048:
            return "more memory than this GPU has", f"{card / 1e9:.0f} GB", None
        pack = roofline.traced_pack(KNOWN[BIG], "ddp", True, tokens, 8)
    # one pack alone: its gradient is new, so nothing of an older one is alive at the peak
    predicted = sum(pack["memory"].values()) - pack["memory"]["DDP buckets"]
    times = []
    for end in (roofline.PESSIMIST, roofline.OPTIMIST):
        p = roofline.at_end(roofline.ASSUMED, end)
        times.append(sum(roofline.pack_seconds(pack, tokens, tokens, p).values()))
    model = random_model(BIG, device)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    one_step(model, optimizer, tokens, device)
    torch.cuda.reset_peak_memory_stats()
    seconds = sorted(one_step(model, optimizer, tokens, device) for _ in range(3))[1]
    peak = torch.cuda.max_memory_allocated()
    foreseen = (f"{tokens:,} tokens: at most {predicted / 1e9:.1f} GB; {tokens / times[0]:,.0f} to "
                f"{tokens / times[1]:,.0f} tokens/s (assumed for an H100)")
    seen = f"{peak / 1e9:.1f} GB; {tokens / seconds:,.0f} tokens/s"
    return foreseen, seen, peak < 1.1 * predicted


# -------------------------------------------------------------------------------------- the stages


def run(*words, **environment):
    """One of our commands; its last words are the error if it fails."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True,
                          text=True, env={**os.environ, **environment})
    if done.returncode:
        raise RuntimeError((done.stderr or done.stdout).strip().splitlines()[-1])
    return done.stdout


@functools.cache
def toy_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="gpu_checks_"))
    run("toy/world.py", "--out", folder, "--seed", 0, "--n-queries", 40, "--traces", 2,
        "--n-eval", 8, "--n-rlvr", 24)
    rows = []
    for n, line in enumerate((folder / "teacher_source.jsonl").read_text().splitlines()):
        row = json.loads(line)
        rows.append({"sid": f"s{n}", "pid": f"p{n}", "problem": row["query"],
                     "response": row["DeepSeek-R1_Response_List"][0],
                     "objective": "ul" if n % 2 else "ce", "ppl": 2.0, "n_tokens": 1})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def rlvr(out: str, engine: str, steps: int):
    folder = toy_folder()
    run("04_rlvr.py", "--recipe", "recipes/toy.toml", "--model", BASE, "--problems",
        folder / "rlvr.jsonl", "--out", folder / out, "--engine", engine, "--prompts-per-step", 4,
        "--rollouts", 4, "--max-steps", steps, "--save-every", 1, "--updates-per-batch", 1)
    return [json.loads(line) for line in (folder / out / "metrics.jsonl").open()]


def grpo(device, engine: str):
    """Two steps of GRPO on toy/base: engine and trainer agree, the reward is a share."""
    if engine == "vllm" and importlib.util.find_spec("vllm") is None:
        return "gaps as with Hugging Face's", "vLLM is not installed", None
    limit = 2e-2 if device == "cuda" or engine == "vllm" else 1e-4
    rows = rlvr(f"rlvr_{engine}", engine, 2)
    worst = max(max(row["logp_gap"], row["sync_gap_mean"]) for row in rows)
    reward = rows[-1]["reward"]
    seen = f"{worst:.1e}; reward {reward:.2f}"
    return f"logp gaps under {limit:.0e}", seen, worst < limit and 0 <= reward <= 1


def resume(device):
    """The run of `grpo`, its end taken away, goes on from its checkpoint after step 1."""
    shutil.rmtree(toy_folder() / "rlvr_hf" / "final")
    rows = rlvr("rlvr_hf", "hf", 3)
    steps = [row["step"] for row in rows]
    return "steps [1, 2, 3]", f"steps {steps}", steps == [1, 2, 3]


def one_rank(device):
    """03 under torchrun with one rank: nccl on a GPU, gloo on a CPU."""
    folder = toy_folder()
    run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 1, "--",
        "03_train_oxa.py", "--recipe", "recipes/toy.toml", "--model", BASE, "--data",
        folder / "train.jsonl", "--out", folder / "sft", "--epochs", 2, "--ce-per-step", 8,
        "--ul-per-step", 8)
    rows = [json.loads(line) for line in (folder / "sft/metrics.jsonl").open()]
    losses = [row["loss"] for row in rows]
    seen = f"loss {losses[0]:.3f} to {losses[-1]:.3f} in {len(losses)} steps"
    return "the loss falls", seen, losses[-1] < losses[0]


# --------------------------------------------------------------------------------------- the table

CHECKS = {
    "versions": versions,
    "attention": functools.partial(attention, share=False),
    "attention, shared prompts": functools.partial(attention, share=True),
    "log-probs and gradients": primitive,
    "output layer in bf16": output_layer,
    "frozen models in bf16": frozen,
    "a step of 1.5B": full_step,
    "GRPO, Hugging Face engine": functools.partial(grpo, engine="hf"),
    "resume": resume,
    "one rank under torchrun": one_rank,
    "GRPO, vLLM": functools.partial(grpo, engine="vllm"),
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--on-cpu", action="store_true", help="the checks as far as a CPU goes")
    parser.add_argument("--only", default="", help="checks whose name contains this")
    args = parser.parse_args(argv)
    if not (args.on_cpu or torch.cuda.is_available()):
        common.die("no GPU here: these checks need one (a CPU runs them with "
                   "python tests/gpu_checks.py --on-cpu)")
    device = "cpu" if args.on_cpu else "cuda"
    failed = []
    print(f"{'check':26} {'':6} predicted | seen")
    for name, check in CHECKS.items():
        if args.only not in name:
            continue
        start = time.perf_counter()
        try:
            predicted, seen, passed = check(device)
        except Exception as error:      # a broken check is a failed one; the others still run
            traceback.print_exc()
            predicted, seen, passed = "to run", f"{type(error).__name__}: {error}", False
        word = {True: "ok", False: "FAILED", None: "-"}[passed]
        seconds = time.perf_counter() - start
        print(f"{name:26} {word:6} {predicted} | {seen} ({seconds:.0f} s)", flush=True)
        if passed is False:
            failed.append(name)
    print("failed: " + ", ".join(failed) if failed else "no check failed")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
