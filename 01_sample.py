"""Draw responses: teacher traces are imported, a model's own samples are generated.

    problems       a problem set or a benchmark                  ->  problems rows
    teacher        a teacher's traces (one row per response)     ->  samples rows, and their problems rows
    model          n samples of a model on every problem         ->  samples rows (self-distillation)
    contamination  training problems that share a 13-gram with a benchmark are dropped and counted
    prepare-base   a base of 4,096 positions  ->  the same weights with 40,000, rope_theta 1e6, two stop tokens

A source is a hub id or a local path (JSONL, parquet, `save_to_disk`); the columns of the known ones are declared in
sources.py and checked, not guessed.

Deliberate simplifications: teacher traces count as finished (`finish = stop`); a response is imported as it is, but for
an opening `<think>` that was part of its prompt and is put back.

Commands (of the paper's recipe; `run_all.sh` has them all):
    python 01_sample.py problems --source HuggingFaceH4/aime_2024 --out aime24.jsonl
    python 01_sample.py teacher --source takagi97/OXA-AceReason-1.1-Math --answers boxed --model BASE \\
        --out teacher.jsonl --problems-out problems.jsonl --benchmarks aime24.jsonl minerva.jsonl
    torchrun --nproc_per_node 8 -- 01_sample.py model --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B \\
        --problems problems.jsonl --n 8 --out self.jsonl
"""

import filecmp
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import common
from model import (check_positions, decode_response, encode_response, load_config, load_tokenizer,
                   render_prompt, stop_ids)
from engines import make_engine
from sources import SOURCES, Overlap, read_source

# -------------------------------------------------------------------------------------------------------- contamination


def make_overlap(args):
    return Overlap(args.benchmarks, args.ngram, args.boilerplate) if args.benchmarks else None


def report_path(out):
    return Path(out).with_suffix(".contamination.json")


def contamination(args):
    overlap, rows = make_overlap(args), 0
    with common.replace_file(args.out) as file:
        for row in common.read_jsonl(args.problems, {"pid": str, "problem": str}):
            if not overlap.hit(row["pid"], row["problem"]):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                rows += 1
    overlap.report(report_path(args.out))
    common.write_meta(args.out, "problems", args, [args.problems, *args.benchmarks], rows,
                        n_contaminated=len(overlap.dropped))


# ------------------------------------------------------------------------------------------ problems and teacher traces


def source_name(args):
    """The `source` field of rows: --name, or the last part of the hub id or file name, in lower case."""
    return args.name or Path(args.source).name.split(".jsonl")[0].split(".parquet")[0].lower()


def say(what, counts):
    print(f"{what}: " + ", ".join(f"{value:,} {key}" for key, value in counts.items()), flush=True)


def problems(args):
    """One row per distinct problem that has an answer, in the order of the source; `--limit` takes a seeded subset."""
    source, items = read_source(args)
    if source.answer is None:
        common.die(f"{args.source} has no ground truth; `teacher --problems-out` makes its problems")
    overlap, counts, rows = make_overlap(args), Counter(), {}
    for pid, problem, answer, _ in items:
        counts["rows"] += 1
        if answer is None:
            counts["without an answer"] += 1
        elif pid in rows:
            counts["duplicates"] += 1
            counts["duplicates with another answer (the first is kept)"] += rows[pid]["answer"] != answer
        elif overlap and overlap.hit(pid, problem):
            counts["contaminated"] += 1
        else:
            rows[pid] = {"pid": pid, "problem": problem, "answer": answer, "source": source_name(args)}
    if args.limit and len(rows) > args.limit:   # a subset that depends on the seed and the problem alone
        chosen = set(sorted(rows, key=lambda pid: common.request_seed(args.seed, pid))[:args.limit])
        counts["over --limit"] = len(rows) - args.limit
        rows = {pid: row for pid, row in rows.items() if pid in chosen}
    counts["kept"] = len(rows)
    if not rows:
        common.die(f"{args.source}: no usable problem ({dict(counts)})")
    with common.replace_file(args.out) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values())
    if overlap:
        overlap.report(report_path(args.out))
    common.write_meta(args.out, "problems", args, [args.source, *(args.benchmarks or [])], len(rows), counts=counts)
    say(args.out, counts)


def restore_think(text):
    """A response whose opening `<think>` was part of the prompt gets it back."""
    return text if text.lstrip().startswith("<think>") else "<think>\n" + text


def teacher(args):
    """One samples row per response; the answers come from a column, from `--problems`, or from the responses."""
    source, items = read_source(args)
    if source.response is None:
        common.die(f"{args.source} has no responses")
    known = {}
    if args.answers == "join":
        if not args.problems:
            common.die("--answers join needs --problems (rows with pid and answer)")
        fields = {"pid": str, "answer": (str, list)}
        known = {row["pid"]: row["answer"] for row in common.read_jsonl(args.problems, fields)}
    elif args.answers == "column" and source.answer is None:
        common.die(f"{args.source} has no column of answers: give --answers join --problems P.jsonl, or, if all its "
                   "responses are known to be right, --answers boxed")
    if args.answers == "boxed":
        from grading.verifier import verify   # sympy takes a second to import: only where it is needed
    tokenizer = load_tokenizer(args.model)
    inputs = [args.source, *(args.benchmarks or []), *([args.problems] if args.problems else [])]
    common.start_output(args.out, "samples", args, inputs)
    written, writer = common.append_jsonl(args.out, "sid")
    problem_rows, overlap, counts, n_of = {}, make_overlap(args), Counter(), Counter()
    with writer:
        for pid, problem, answer, responses in items:
            counts["rows of the source"] += 1
            if pid not in n_of and args.limit and len(n_of) == args.limit:
                break
            if args.answers == "join":
                answer = known.get(pid)
            elif args.answers == "boxed":
                answer = next(filter(None, (verify(r, "0").predicted for r in responses)), None)
            if answer is None:
                counts["rows without an answer"] += 1
                continue
            if pid not in n_of:
                n_of[pid] = 0
                if overlap and overlap.hit(pid, problem):
                    n_of[pid] = -1
                    counts["contaminated problems"] += 1
                else:
                    problem_rows[pid] = {"pid": pid, "problem": problem, "answer": answer, "source": source_name(args)}
            for response in responses if n_of[pid] >= 0 else ():
                k, n_of[pid] = n_of[pid], n_of[pid] + 1
                sid = f"{pid}:{source_name(args)}:{k}"
                counts["responses"] += 1
                counts["responses given their <think> back"] += restore_think(response) != response
                if sid not in written:
                    response = restore_think(response)
                    writer.write({"sid": sid, "pid": pid, "source": source_name(args), "k": k, "seed": None,
                                  "response": response, "n_tokens": len(encode_response(tokenizer, response)),
                                  "finish": "stop"})
    if not counts["responses"]:
        common.die(f"{args.source}: no usable response ({dict(counts)})")
    counts["problems"] = len(problem_rows)
    if args.problems_out:
        with common.replace_file(args.problems_out) as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in problem_rows.values())
        common.write_meta(args.problems_out, "problems", args, inputs, len(problem_rows))
    if overlap:
        overlap.report(report_path(args.out))
    common.write_meta(args.out, "samples", args, inputs, counts["responses"], counts=counts)
    say(args.out, counts)


# ------------------------------------------------------------------------------------------------ a model's own samples


def model_samples(args):
    """`--n` samples of every problem, split over the ranks of torchrun; a restart draws only what is missing."""
    dist = common.init_distributed(patience_hours=24)       # a rank may draw for hours after another is done
    tokenizer = load_tokenizer(args.model, any_markup=True)
    out = Path(args.out)
    prompts, too_long = {}, 0
    for row in common.read_jsonl(args.problems, {"pid": str, "problem": str}):
        if args.limit and len(prompts) == args.limit:
            break
        prompt = render_prompt(tokenizer, row["problem"])
        if len(prompt) > args.max_prompt_tokens:
            too_long += 1
        else:
            prompts[row["pid"]] = prompt
    if not prompts:
        common.die(f"{args.problems}: every prompt is longer than --max-prompt-tokens {args.max_prompt_tokens}")
    longest = max(map(len, prompts.values())) + args.max_tokens
    check_positions(load_config(args.model), longest, "the longest prompt with --max-tokens")
    keys = {f"{pid}:{args.name}:{k}": (pid, k) for pid in prompts for k in range(args.n)}
    place = {sid: i for i, sid in enumerate(keys)}.__getitem__
    if dist.rank == 0:
        common.start_output(out, "samples", args, [args.problems], may_differ=("kv_cache_gb", "gpu_memory"))
        common.merge_parts(out, "sid", place)                 # what a killed run left
    common.barrier()
    done = common.stored_keys(out, "sid")
    if dist.rank == 0:
        print(f"{len(prompts)} problems x {args.n} samples, {len(done)} of them there; {too_long} problems dropped "
              f"whose prompt is over {args.max_prompt_tokens} tokens", flush=True)
    mine = {sid: keys[sid] for sid in [sid for sid in keys if sid not in done][dist.rank::dist.world]}
    n_failed = draw(args, dist, tokenizer, mine, prompts, longest) if mine else 0
    n_failed = int(common.all_reduce_sum(torch.tensor(n_failed, device=dist.device)))
    if dist.rank == 0:
        common.merge_parts(out, "sid", place)
        if not common.stored_keys(out, "sid"):
            common.die(f"{out}: every request failed ({n_failed})")
        describe(args, n_failed=n_failed, n_prompts_too_long=too_long)
    common.barrier()


def draw(args, dist, tokenizer, mine, prompts, longest):
    """Generate the requests `mine` (sid -> (pid, k)) and append their rows to this rank's part. -> how many failed."""
    name, n_failed, sids = args.name, 0, list(mine)
    engine = make_engine(args.engine, args.model, longest, device=dist.device, gpu_memory=args.gpu_memory,
                         kv_cache_gb=args.kv_cache_gb)
    # The `<think>` with which some templates open the answer belongs to the response.
    opened = tokenizer.decode(next(iter(prompts.values()))).rstrip().endswith("<think>")
    seeds = [common.request_seed(args.seed, pid, k) for pid, k in mine.values()]
    path = common.part_path(args.out, dist.rank)
    with common.append_jsonl(path, "sid")[1] as writer, tqdm(total=len(mine), disable=dist.rank > 0) as progress:
        for i, completion in engine.generate([prompts[pid] for pid, _ in mine.values()], seeds, args.temperature,
                                             args.top_p, args.max_tokens, progress):
            if completion.finish not in ("stop", "length"):
                n_failed += 1
                continue
            pid, k = mine[sids[i]]
            text = decode_response(tokenizer, completion.ids)
            writer.write({"sid": sids[i], "pid": pid, "source": name, "k": k, "seed": seeds[i],
                          "response": restore_think(text) if opened else text,
                          "n_tokens": len(completion.ids), "finish": completion.finish})
    return n_failed


def describe(args, **counts):
    """The finished output: its sidecar, and what is in it."""
    rows = [(row["finish"], row["n_tokens"]) for row in common.read_jsonl(args.out, {"finish": str, "n_tokens": int}, text=False)]
    finish, n_tokens = Counter(f for f, _ in rows), [n for _, n in rows]
    common.write_meta(args.out, "samples", args, [args.problems], len(rows), model=args.model, finish=finish, **counts)
    say(args.out, {"samples": len(rows), **finish, **counts})
    low, median, high, top = (int(q) for q in np.quantile(n_tokens, [0, 0.5, 0.9, 1]))
    print(f"tokens a sample: min {low}, median {median}, 90 % {high}, max {top}", flush=True)


# ----------------------------------------------------------------------------------------------- base model preparation

# Qwen's markup without a default system prompt: what the model is told is what the data say (PAPER: "Prompt").
CHAT_TEMPLATE = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
                 "+ '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
                 "{% endif %}")


def check_weights(path, config, tokenizer):
    """Refuse a base whose weights, configuration and tokenizer do not belong together."""
    from safetensors import safe_open
    where = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            where.update({name: file for name in tensors.keys()})
    if "model.embed_tokens.weight" not in where:
        common.die(f"{path} has no safetensors weights of a decoder (model.embed_tokens.weight)")

    def tensor(name):
        with safe_open(where[name], "pt") as tensors:
            return tensors.get_tensor(name)

    rows = tensor("model.embed_tokens.weight").shape[0]
    if rows != config["vocab_size"]:
        common.die(f"{path}: vocab_size is {config['vocab_size']}, the embedding has {rows} rows")
    if len(tokenizer) > rows:
        common.die(f"{path}: the tokenizer has {len(tokenizer)} tokens, the embedding {rows} rows")
    tied = config.get("tie_word_embeddings", False)
    if not tied and "lm_head.weight" not in where:
        common.die(f"{path}: tie_word_embeddings is false, but there is no lm_head.weight")
    if tied and "lm_head.weight" in where and not tensor("lm_head.weight").equal(tensor("model.embed_tokens.weight")):
        common.die(f"{path}: tie_word_embeddings is true, but lm_head.weight differs from the embedding")


def prepare_base(args):
    """The same weights in a new directory: more positions, slower rotation, no system prompt, both stop tokens."""
    source, out = Path(args.model), Path(args.out)
    if not source.is_dir():
        from huggingface_hub import snapshot_download
        try:
            source = Path(snapshot_download(args.model, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"]))
        except (OSError, ValueError) as error:
            common.die(f"{args.model} cannot be loaded: {str(error).splitlines()[0]}")
    if not (source / "config.json").exists():
        common.die(f"{source} is no model: config.json is missing")
    config = json.loads((source / "config.json").read_text())
    tokenizer = load_tokenizer(source)
    check_weights(source, config, tokenizer)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        common.die(f"{source} scales its rotary embedding ({rope}): a base with plain RoPE is expected")
    if "rope_parameters" in config:
        config["rope_parameters"] = {**rope, "rope_theta": args.rope_theta}
    else:
        config["rope_theta"] = args.rope_theta
    config["max_position_embeddings"] = args.positions
    generation = {"eos_token_id": stop_ids(tokenizer), "pad_token_id": stop_ids(tokenizer)[1]}
    tokenizer_config = json.loads((source / "tokenizer_config.json").read_text())
    tokenizer_config.update(chat_template=CHAT_TEMPLATE, model_max_length=args.positions)
    written = {"config.json": config, "generation_config.json": generation, "tokenizer_config.json": tokenizer_config}
    written = {name: json.dumps(body, indent=2, ensure_ascii=False) + "\n" for name, body in written.items()}
    copied = [f for f in source.iterdir() if f.is_file() and f.name not in written and f.suffix != ".jinja"
              and not f.name.startswith(".") and not f.name.endswith(".meta.json")
              and f.suffix in (".json", ".safetensors", ".txt", ".model")]
    if out.exists():
        same = all((out / name).exists() and (out / name).read_text() == text for name, text in written.items())
        if not same or not all((out / f.name).exists() and filecmp.cmp(f, out / f.name, shallow=False) for f in copied):
            common.die(f"{out} exists and is not {args.model} prepared with these settings; remove it or "
                       "choose another --out")
        print(f"{out}: already prepared, nothing written", flush=True)
        return
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for file in copied:
        shutil.copyfile(file, temporary / file.name)
    for name, text in written.items():
        (temporary / name).write_text(text)
    temporary.rename(out)
    common.write_meta(out / "base", "base", args, [source / "config.json"])
    print(f"{out}: rope_theta {args.rope_theta:g}, {args.positions} positions, no system prompt, stops on "
          f"{generation['eos_token_id']}; weights unchanged", flush=True)


# --------------------------------------------------------------------------------------------------------- command line


def build_parser():
    parser = common.make_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def reads_source(p):
        p.add_argument("--source", required=True, help="hub id, or local JSONL, parquet or save_to_disk path")
        p.add_argument("--format", choices=sorted(SOURCES), help="declared columns; default: by hub id, "
                       "else by the columns")
        p.add_argument("--columns", nargs="+", metavar="FIELD=COLUMN", help="for a source that is not declared: "
                       "problem=COLUMN [answer=COLUMN] [response=COLUMN]; other columns are ignored")
        p.add_argument("--split", help="split of the source; default: the declared one, else train")
        p.add_argument("--name", help="`source` of the rows; default: last part of --source")
        p.add_argument("--limit", type=int, default=0, help="at most this many problems; 0: all")

    def drops_overlap(p, required=False):
        p.add_argument("--benchmarks", nargs="+", metavar="JSONL", required=required,
                       help="problems rows; training problems that overlap them are dropped and reported")
        p.add_argument("--ngram", type=int, default=13, help="words of an n-gram")
        p.add_argument("--boilerplate", type=int, default=3, help="an n-gram in this many benchmark problems or more "
                       "is no evidence; 0: every n-gram is")

    def writes(p, what):
        p.add_argument("--out", required=True, metavar="JSONL", help=what)

    p = common.add_command(commands, "problems", "a problem set or benchmark -> problems rows")
    reads_source(p)
    drops_overlap(p)
    p.add_argument("--seed", type=int, default=42, help="chooses the subset of --limit")
    writes(p, "problems rows")

    p = common.add_command(commands, "teacher", "teacher traces -> samples rows")
    reads_source(p)
    drops_overlap(p)
    p.add_argument("--model", required=True, help="directory or hub id whose tokenizer counts n_tokens (the base)")
    p.add_argument("--answers", choices=("column", "join", "boxed"), default="column", help="ground truth: a column of "
                   "the source; joined by problem text from --problems; or the boxed answer of the first response "
                   "(only for a source whose responses are all verified)")
    p.add_argument("--problems", metavar="JSONL", help="problems rows for --answers join")
    p.add_argument("--problems-out", metavar="JSONL", help="problems rows of the imported responses")
    writes(p, "samples rows")

    p = common.add_command(commands, "model", "a model's own samples -> samples rows", section="sample")
    p.add_argument("--model", required=True, help="directory or hub id")
    p.add_argument("--problems", required=True, metavar="JSONL", help="problems rows")
    p.add_argument("--n", type=int, default=8, help="samples a problem")
    p.add_argument("--temperature", type=float, default=0.6, help="0: greedy")
    p.add_argument("--top-p", type=float, default=0.95, help="nucleus")
    p.add_argument("--max-tokens", type=int, default=25000, help="tokens of a response; one that is longer is cut and "
                   "marked finish = length")
    p.add_argument("--max-prompt-tokens", type=int, default=1536, help="problems with a longer prompt are "
                   "dropped and counted")
    p.add_argument("--seed", type=int, default=42, help="request seed = hash(seed, pid, k)")
    p.add_argument("--name", default="self", help="`source` of the rows")
    p.add_argument("--limit", type=int, default=0, help="first problems only; 0: all")
    p.add_argument("--engine", choices=("auto", "vllm", "hf"), default="auto", help="auto: vLLM where it is "
                   "installed with a GPU")
    p.add_argument("--gpu-memory", type=float, default=0.9, help="share of a card's memory for vLLM")
    p.add_argument("--kv-cache-gb", type=float, default=0, help="KV cache of vLLM in GiB; 0: what --gpu-memory leaves")
    writes(p, "samples rows")

    p = common.add_command(commands, "contamination", "drop training problems that overlap a benchmark")
    p.add_argument("--problems", required=True, metavar="JSONL", help="problems rows")
    drops_overlap(p, required=True)
    writes(p, "problems rows that overlap no benchmark; the report is OUT.contamination.json")

    p = common.add_command(commands, "prepare-base", "a base model with 4,096 positions -> with 40,000")
    p.add_argument("--model", required=True, help="directory or hub id")
    p.add_argument("--rope-theta", type=float, default=1e6, help="base of the rotary embedding's wave lengths")
    p.add_argument("--positions", type=int, default=40000, help="max_position_embeddings, tokens")
    p.add_argument("--out", required=True, metavar="DIR", help="new model directory")
    return parser


def main(argv=None):
    args = common.parse_args(build_parser(), argv=argv)
    common.check_range(args, ["top_p", "gpu_memory"], n=1, max_tokens=1, max_prompt_tokens=1, positions=1, ngram=1, temperature=0,
                       limit=0, boilerplate=0)
    {"problems": problems, "teacher": teacher, "model": model_samples, "contamination": contamination,
     "prepare-base": prepare_base}[args.command](args)


if __name__ == "__main__":
    main()
