"""Run other implementations' own test suites on dynconv: python tests/peers.py FOLDER.

FOLDER holds their repositories, as `git clone` names them: causal-conv1d, flash-linear-attention, attention-gym and
dynamic-conv1d (the paper's). Nothing of theirs is kept here. What they compare with, and what else their tests import,
is loaded from there; only the functions under test are replaced, by shims around dynconv (peer_shims.py). Prints a row
for each suite: tests passed, failed, skipped by the suite itself, and left out, with the reasons below it.

The suites want a GPU, pytest and einops. Without a GPU their tensors are made on the CPU, where dynconv runs in plain
PyTorch, or through Triton's interpreter if TRITON_INTERPRET=1; give --largest, so that it ends.
"""

import argparse
import importlib
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

_GPU = torch.cuda.is_available()  # asked before a shim answers


@dataclass(frozen=True)
class Suite:
    repository: str
    file: str
    # Names of tests that are about the other implementation's inside, and why they say nothing about dynconv.
    left_out: dict[str, str] = field(default_factory=dict)


_INSIDE = "of its own kernels' settings, compilation or operators, which its public functions do not show"
_ACTIVATIONS = "of activations that a user registers; dynconv has silu"
SUITES = {
    "dynamic-conv1d": Suite("dynamic-conv1d", "test.py"),
    "causal-conv1d": Suite(
        "causal-conv1d",
        "tests/test_causal_conv1d.py",
        {
            "default_mode_is_not_reproducible": "wants gradients that differ from run to run; dynconv's never do",
            "race_condition": "repeats one case 10,000 times",
        },
    ),
    "flash-linear-attention": Suite("flash-linear-attention", "tests/modules/test_conv.py"),
    "attention-gym": Suite(
        "attention-gym",
        "test/test_kda_short_conv_cute.py",
        dict.fromkeys(
            (
                "dtype_defaults", "select_tma", "rejects_partial", "tma_backward", "tma_input", "stateful_tma",
                "tuning", "tune_compiles", "custom_op_registration", "constant_history", "cuda_graph", "configured",
                "cache_key", "defaults_support", "validates_inputs",
            ),
            _INSIDE,
        )
        | dict.fromkeys(("custom_activation", "activation_registration", "closure", "global_mutation"), _ACTIVATIONS)
        | dict.fromkeys(
            ("packed_offsets_obey", "initial_state_obeys"),
            "wants an error if cu_seqlens or a state change before the backward pass; dynconv has its own copies",
        )
        | {"width_one_preserves": "asks for the gradient of an empty state, on which no result of dynconv depends"},
    ),
}  # fmt: skip


class OnCpu(TorchFunctionMode):
    """Makes on the CPU what is asked for on a GPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        args = tuple("cpu" if isinstance(a, str) and a.startswith("cuda") else a for a in args)
        return function(*args, **kwargs)


def pretend_a_gpu() -> None:
    """Let tests that ask for a GPU run on the CPU."""
    OnCpu().__enter__()
    torch.cuda.synchronize = lambda *_: None

    class Generator(torch.Generator):
        def __new__(cls, device: object = None) -> "Generator":  # noqa: ARG004
            return super().__new__(cls, "cpu")

    torch.Generator = Generator  # type: ignore[misc]


class Plugin:
    """Leaves out tests by name and size, and counts outcomes."""

    def __init__(self, suite: Suite, largest: int) -> None:
        self.suite, self.largest = suite, largest
        self.counts = {"passed": 0, "failed": 0, "skipped": 0, "left out": 0}
        self.reasons: dict[str, int] = {}
        self.failures: list[str] = []

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        kept = []
        for item in items:
            reason = next((why for part, why in self.suite.left_out.items() if part in item.name), None)
            if reason is None and "fullgraph" in item.name and not _GPU:
                reason = "compile for a GPU"
            if reason is None and self._size(item) > self.largest:
                reason = f"larger than {self.largest:,} elements"
            if reason is None:
                kept.append(item)
            else:
                self.counts["left out"] += 1
                self.reasons[reason] = self.reasons.get(reason, 0) + 1
        items[:] = kept

    @staticmethod
    def _size(item: Any) -> int:
        """Elements of x, as the parameters' names tell; causal-conv1d's tests of decoding have 64 sequences."""
        given = item.callspec.params if hasattr(item, "callspec") else {}
        sizes = [given.get(name) or 1 for name in ("B", "T", "D", "dim", "seqlen", "tokens", "channels")]
        sizes.append(sum(given.get("lengths") or [1]))
        batch = 64 if "update" in item.name and "dim" in given else 1
        return batch * math.prod(size for size in sizes if isinstance(size, int))

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.skipped:
            why = str(report.longrepr[-1]).removeprefix("Skipped: ")
            self.reasons[why] = self.reasons.get(why, 0) + 1
        if report.failed:
            message = getattr(getattr(report.longrepr, "reprcrash", None), "message", str(report.longrepr))
            self.failures.append(f"{report.nodeid.split('::')[-1]}: {message.strip().splitlines()[0]}")

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.counts["failed"] += 1
            self.failures.append(f"not collected: {str(report.longrepr).strip().splitlines()[-1]}")


def run_script(path: Path, plugin: Plugin) -> None:
    """The paper's test is a script, whose function `_check` holds one configuration to its reference."""
    spec = importlib.util.spec_from_file_location("peer_test", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    torch.cuda.is_available = lambda: True
    spec.loader.exec_module(module)
    check = vars(module)["_check"]

    def counted(kernel: Any, *rest: Any) -> None:
        try:
            check(kernel, *rest)
            plugin.counts["passed"] += 1
        except Exception as error:
            plugin.counts["failed"] += 1
            plugin.failures.append(f"{kernel.__name__}: {error}".splitlines()[0])

    vars(module)["_check"] = counted
    vars(module)["main"]()


def run_suite(name: str, folder: Path, largest: int, expression: str) -> dict[str, Any]:
    """Run one suite in this process, which its shims leave unfit for another."""
    import peer_shims

    suite = SUITES[name]
    root = folder / suite.repository
    if not (root / suite.file).is_file():
        return {"missing": str(root / suite.file)}
    if not _GPU:
        pretend_a_gpu()
    peer_shims.INSTALL[name](root)
    plugin = Plugin(suite, largest)
    if suite.file == "test.py":
        run_script(root / suite.file, plugin)
    else:
        options = [
            "-q",
            "-k",
            expression,
            "-p",
            "no:cacheprovider",
            "--tb=short",
            "--no-header",
            f"--rootdir={root}",
            "-c",
            os.devnull,
        ]
        pytest.main([*options, str(root / suite.file)], plugins=[plugin])
    return {"counts": plugin.counts, "reasons": plugin.reasons, "failures": plugin.failures}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the repositories are")
    parser.add_argument("--suite", choices=SUITES, action="append", help="run only this one; may be given again")
    parser.add_argument("--largest", type=int, default=2**62, help="leave out tests of more elements in x")
    parser.add_argument("-k", default="", metavar="EXPRESSION", help="run only tests that match, as pytest's -k")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)  # where one suite's process writes its outcome
    given = parser.parse_args()
    if given.inside:
        outcome = run_suite(given.suite[0], given.folder.resolve(), given.largest, given.k)
        given.inside.write_text(json.dumps(outcome))
        return 0
    rows, notes = [], []
    for name in given.suite or SUITES:
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "outcome.json"
            options = ["--suite", name, "--largest", str(given.largest), "-k", given.k, "--inside", str(file)]
            subprocess.run([sys.executable, __file__, str(given.folder), *options], check=False, stdout=sys.stderr)
            outcome = json.loads(file.read_text()) if file.exists() else {"missing": "its process died"}
        counts = outcome.get("counts", dict.fromkeys(("passed", "failed", "skipped", "left out"), "-"))
        rows.append([name, *(str(counts[key]) for key in ("passed", "failed", "skipped", "left out"))])
        notes += [f"{name}: {outcome['missing']}: not there"] if "missing" in outcome else []
        notes += [f"{name}: {count} {why}" for why, count in outcome.get("reasons", {}).items()]
        notes += [f"{name}: FAILED {failure}" for failure in outcome.get("failures", [])]
    for row in [["suite", "passed", "failed", "skipped", "left out"], *rows]:
        print(f"{row[0]:24}" + "".join(f"{cell:>10}" for cell in row[1:]))
    print("\n".join(["", *notes]))
    return int(any(row[2] != "0" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
