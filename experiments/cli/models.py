"""The verbs that use a trained run: eval, generate, export."""

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.logs.files import require_writable
from experiments import terminal
from experiments.cli.arguments import Subparsers, add_verb, format_argument

if TYPE_CHECKING:
    from experiments.design.config import RunConfig
    from experiments.evaluation.load import TrainedRun

EXAMPLE_RUN = "results/runs/demo/lowrank-qkv-110k-s0-380deab9ed"
# Everything that a terminal could take for a command, so that generated text cannot move its cursor
_CONTROL_CHARACTERS = {
    code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"
}


def register(subparsers: Subparsers) -> None:
    """Add the verbs of this file."""
    _add_eval(subparsers)
    _add_generate(subparsers)
    _add_export(subparsers)


def _device_argument(verb: argparse.ArgumentParser) -> None:
    text = "where the model computes (default auto: the first GPU, if there is one)"
    verb.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help=text)


def _run_argument(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("run_dir", type=Path, metavar="RUN", help="the folder of a finished run, STORE/RUN_ID")


def _device(args: argparse.Namespace) -> str:
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda was asked for and torch sees no GPU; use --device cpu")
    if args.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return str(args.device)


def _add_eval(subparsers: Subparsers) -> None:
    verb = add_verb(
        subparsers,
        "eval",
        _eval,
        "evaluate finished runs on folders of text, on tasks of lm-evaluation-harness, or on their own generated task "
        "at other lengths; the results join their logs",
        "results/runs/demo --text my-text                  # every folder in my-text is a domain",
        f"{EXAMPLE_RUN} --tasks lambada_openai,wikitext",
        "results/runs/demo --tasks mine --include my-tasks --json",
        "results/runs/demo-mqar --lengths 512,1024         # recall in longer sequences than trained on",
    )
    text = "the folder of a finished run, or a store, whose finished runs are all evaluated"
    verb.add_argument("runs", type=Path, metavar="RUN|STORE", nargs="+", help=text)
    verb.add_argument("--text", type=Path, metavar="DIR", help="a folder of text; each folder inside it is a domain")
    verb.add_argument(
        "--tasks", metavar="TASK,...", help="tasks of lm-evaluation-harness (pip install 'dynconv[eval]')"
    )
    verb.add_argument("--include", type=Path, metavar="DIR", help="a folder with task files of your own (.yaml)")
    verb.add_argument("--shots", type=int, metavar="N", help="examples before each question (default: the task's)")
    verb.add_argument("--limit", type=int, metavar="N", help="the first N questions of each task only, to try it out")
    text = "sequence lengths at which to evaluate runs on generated tasks, such as recall"
    verb.add_argument("--lengths", metavar="T,...", help=text)
    _device_argument(verb)
    format_argument(verb)


def _eval(args: argparse.Namespace) -> int:
    from analysis.logs.writer import add_evaluations
    from experiments.evaluation.domains import beside_domains, passed_over

    lengths = _lengths(args)
    if not lengths and args.text is None and not (args.tasks or "").strip(" ,"):
        raise ValueError("eval needs something to evaluate on; got neither --text nor --tasks nor --lengths; name one")
    for name in ("include", "shots", "limit"):
        if getattr(args, name) is not None and args.tasks is None:
            raise ValueError(f"--{name} belongs to --tasks, of which none are named; name those to evaluate")
    beside = [] if args.text is None else beside_domains(args.text)  # refuses wrong folders before a model is loaded
    if beside:
        told = f"{beside[0]}{f' and {len(beside) - 1} more' * (len(beside) > 1)} in {args.text}"
        terminal.warn(f"{told} left out: with folders inside, only these are evaluated")
    run_dirs = _finished_runs(args.runs, lengths)
    for run_dir in run_dirs:
        require_writable(run_dir / "evals.parquet")
    terminal.warn(*([] if args.text is None else passed_over(args.text)))
    rows = []
    for run_dir in run_dirs:
        config, results, seconds = _evaluated(run_dir, args, lengths)
        add_evaluations(run_dir, results, seconds)
        rows += [
            {"run_id": run_dir.name, "arm": config.arm, "size": config.size, "seed": config.seed}
            | {"task": task, "metric": metric, "value": value}
            for task, metrics in results.items()
            for metric, value in metrics.items()
        ]
    if args.format == "json":
        print(json.dumps(rows, indent=1))
    else:
        print(terminal.align(list(rows[0]), [[_cell(value) for value in row.values()] for row in rows]))
    return 0


def _lengths(args: argparse.Namespace) -> list[int]:
    """Those of --lengths; none if it is not given."""
    if args.lengths is None:
        return []
    if args.text is not None or args.tasks is not None:
        raise ValueError("--lengths is for runs on generated tasks, --text and --tasks are for runs on text; give one")
    words = [word.strip() for word in args.lengths.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise ValueError(
            f"--lengths must be numbers of tokens, as 512,1024; got {args.lengths or 'nothing'}; correct it"
        )
    return list(dict.fromkeys(map(int, words)))


def _evaluated(
    run_dir: Path, args: argparse.Namespace, lengths: list[int]
) -> tuple["RunConfig", Mapping[str, Mapping[str, float]], float]:
    """The run's configuration, its metrics by task, and the seconds that they took."""
    from experiments.evaluation.load import check_finished, load_model, load_run
    from experiments.evaluation.recall import evaluate_lengths

    if not lengths:
        run = load_run(run_dir, _device(args))
        started = time.monotonic()
        return run.config, _results(run, args), time.monotonic() - started
    config = check_finished(run_dir)
    model = load_model(run_dir, config, _device(args))
    started = time.monotonic()
    return config, {config.task_name: evaluate_lengths(config, model, lengths)}, time.monotonic() - started


def _cell(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _results(run: "TrainedRun", args: argparse.Namespace) -> Mapping[str, Mapping[str, float]]:
    """Metrics by task. What is wrong with the harness's tasks raises before the folders of text take their time."""
    from experiments.evaluation.domains import evaluate_domain, find_domains

    results: dict[str, Mapping[str, float]] = {}
    if args.tasks is not None:
        try:
            from experiments.evaluation import harness
        except ImportError as error:
            raise ValueError(f"--tasks needs lm-evaluation-harness ({error}); pip install 'dynconv[eval]'") from error
        tasks = [task.strip() for task in args.tasks.split(",") if task.strip()]
        metrics, truncated = harness.evaluate(run, tasks, args.include, args.shots, args.limit)
        results |= metrics
        if truncated:
            length = run.config.train.sequence_length
            terminal.warn(f"{truncated} contexts were cut on the left, to at most {length} tokens with their answers")
    if args.text is not None:
        results |= {f"text/{name}": evaluate_domain(run, path) for name, path in find_domains(args.text).items()}
    return results


def _finished_runs(paths: list[Path], lengths: list[int]) -> list[Path]:
    """The folders of the runs that are named, and of the finished ones in the stores that are.

    Runs of a store that cannot be evaluated at these lengths or, if there are none, on a text are left out with a line
    on standard error. Raises ValueError for one that is named, before any other is evaluated.
    """
    from experiments.evaluation.load import check_usable
    from experiments.evaluation.recall import check_lengths

    def check(run_dir: Path) -> object:
        return check_lengths(run_dir, lengths) if lengths else check_usable(run_dir)

    trained_on = "generated tasks" if lengths else "text"
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path} does not exist; name a run's folder, STORE/RUN_ID, or a store")
        if (path / "runs.parquet").exists():
            raise ValueError(f"{path} is frozen, and has no weights to evaluate; name the store that it was made from")
        if (path / "config.json").exists():
            check(path)
            found.append(path)
            continue
        finished = sorted(each.parent for each in path.glob("*/run.json"))
        if waiting := [each for each in path.glob("*/config.json") if not (each.parent / "run.json").exists()]:
            terminal.warn(f"{len(waiting)} runs of {path} are not finished and are left out")
        before = len(found)
        for run_dir in finished:
            try:
                check(run_dir)
            except ValueError as error:
                terminal.warn(f"left out: {error}")
            else:
                found.append(run_dir)
        if len(found) == before:
            raise ValueError(
                f"{path} must be a run's folder or a store with finished runs on {trained_on}; it has none; name "
                "another"
            )
    return found


def _add_generate(subparsers: Subparsers) -> None:
    verb = add_verb(
        subparsers,
        "generate",
        _generate,
        "continue a text with a trained run",
        f'{EXAMPLE_RUN} --prompt "def main("',
        f'{EXAMPLE_RUN} --prompt "def main(" --temperature 0 --tokens 50 --json',
    )
    _run_argument(verb)
    verb.add_argument("--prompt", default="", help="the text to continue (default: the beginning of a document)")
    verb.add_argument("--tokens", type=int, default=200, metavar="N", help="stop after N tokens (default 200)")
    verb.add_argument("--temperature", type=float, default=1.0, help="0 takes the most likely token (default 1)")
    verb.add_argument("--top-k", type=int, metavar="K", help="draw from the K most likely tokens only")
    verb.add_argument("--top-p", type=float, metavar="P", help="draw from the most likely tokens that add up to P only")
    verb.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    _device_argument(verb)
    format_argument(verb)


def _generate(args: argparse.Namespace) -> int:
    from experiments.evaluation.generate import Sampling, continue_text
    from experiments.evaluation.load import load_run

    if args.tokens < 1:
        raise ValueError(f"--tokens must be at least 1; got {args.tokens}; raise it")
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed must be 0 to 2^63 - 1; got {args.seed}; choose another")
    if any(
        "\ud800" <= each <= "\udfff" for each in args.prompt
    ):  # how Python holds bytes of an argument that are no UTF-8
        raise ValueError("--prompt must be UTF-8; got other bytes; convert the text")
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    pieces = continue_text(load_run(args.run_dir, _device(args)), args.prompt, args.tokens, sampling, args.seed)
    if args.format == "json":
        print(json.dumps({"run_id": args.run_dir.resolve().name, "prompt": args.prompt, "text": "".join(pieces)}))
        return 0
    print(args.prompt, end="")
    for piece in pieces:
        print(piece.translate(_CONTROL_CHARACTERS), end="", flush=True)
    print()
    return 0


def _add_export(subparsers: Subparsers) -> None:
    verb = add_verb(
        subparsers,
        "export",
        _export,
        "write a trained run as a Hugging Face model, which needs transformers, torch and this package's dynconv",
        f"{EXAMPLE_RUN} --format hf -o my-model",
    )
    _run_argument(verb)
    verb.add_argument("--format", choices=("hf",), default="hf", help="hf: a folder for AutoModelForCausalLM (default)")
    verb.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="the folder to make")


def _export(args: argparse.Namespace) -> int:
    from experiments.evaluation.load import load_run

    try:
        from experiments.evaluation.export import export
    except ImportError as error:
        raise ValueError(f"export needs safetensors ({error}); pip install 'dynconv[hf]'") from error
    if args.output.exists():
        raise ValueError(f"{args.output} exists; remove it, or name another folder")
    require_writable(args.output)
    export(load_run(args.run_dir), args.output)
    print(args.output)
    return 0
