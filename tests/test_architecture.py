"""The house rules that a machine can hold."""

import ast
import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.cli.main import parser
from experiments.design.arms import Arm
from experiments.design.data import DataConfig
from experiments.design.recipe import Recipe
from experiments.design.schedules import SCHEDULES
from experiments.design.sweep_file import Sweep
from experiments.design.train import OPTIMIZERS
from experiments.launching.profile import DataJobs, Job, Profile, Slurm
from experiments.parts.registry import CONVOLUTIONS, FEED_FORWARDS, MIXERS
from experiments.tasks.registry import generators

ROOT = Path(__file__).parent.parent
PACKAGES = ("dynconv", "analysis", "experiments")
LONGEST_FILE = 450  # lines; near 300 is the aim


def test_import_contracts() -> None:
    linter = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        (
            "from experiments.cli.main import parser; parser()",
            {"torch", "pandas", "scipy", "matplotlib", "tokenizers"},
        ),
        ("import experiments.design.sweep, experiments.design.plan", {"torch", "pandas", "numpy"}),
        ("import analysis.logs.writer, analysis.logs.reader", {"torch", "pandas", "pyarrow"}),
        (
            "import analysis.laws.powerlaw, analysis.advantage.multiplier, analysis.pages.tables",
            {"torch", "matplotlib"},
        ),
    ],
)
def test_starting_loads_no_more_than_it_needs(statement: str, absent: set[str]) -> None:
    assert not modules_after(statement) & absent


def test_slurm_and_results_hold_no_package() -> None:
    assert not [
        path for room in ("slurm", "results") for path in (ROOT / room).rglob("*.py") if "runs" not in path.parts
    ]


def test_files_are_whole_and_shallow() -> None:
    """A room is a folder of files that a person can read: two levels, none long, each saying what it is for."""
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            assert len(path.relative_to(ROOT).parts) <= 3, path
            text = path.read_text()
            assert text.count("\n") <= LONGEST_FILE, path
            tree = ast.parse(text)
            assert ast.get_docstring(tree) or not tree.body, f"{path} does not say what it is for"


def test_links_and_images_lead_somewhere() -> None:
    """In the repository, not only on this machine; and to a heading or an anchor of the page, where one is named."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    files = {Path(line) for line in listed.stdout.splitlines()}
    reachable = files | {folder for file in files for folder in file.parents}
    for page in (file for file in files if file.suffix == ".md"):
        for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text()):
            if re.match(r"https?://", target):
                continue
            name, _, anchor = target.partition("#")
            path = (ROOT / page.parent / name).resolve() if name else ROOT / page
            assert path.relative_to(ROOT) in reachable, f"{page} links to {target}"
            assert not anchor or anchor in anchors(path), f"{page} links to {target}"


def anchors(page: Path) -> set[str]:
    """What a link may name after #: of a heading its words in lower case, without punctuation, joined by hyphens."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings} | set(
        re.findall(r'<a id="([^"]+)"></a>', text)
    )


@pytest.mark.parametrize("package", PACKAGES)
def test_the_readme_names_each_folder_and_no_other(package: str) -> None:
    tree = (ROOT / "README.md").read_text().partition("## Where things are")[2].split("```")[1]
    (block,) = re.findall(rf"^{package}/ .*\n((?:  .*\n)*)", tree, re.MULTILINE)
    listed = subprocess.run(["git", "ls-files", package], cwd=ROOT, capture_output=True, text=True, check=True)
    folders = {Path(line).parts[1] for line in listed.stdout.splitlines() if len(Path(line).parts) > 2}
    assert set(re.findall(r"^  (\w+)/ ", block, re.MULTILINE)) == folders


def test_the_readme_names_each_verb() -> None:
    loop = (ROOT / "README.md").read_text().partition("## The loop")[2].partition("\n## ")[0]
    (verbs,) = (action.choices for action in parser()._actions if action.dest == "verb")
    assert verbs is not None
    assert [verb for verb in verbs if not re.search(rf"\b{verb}\b", loop)] == []


@pytest.mark.parametrize(
    ("page", "tables"),
    [
        (
            "experiments/README.md",
            (
                Sweep,
                DataConfig,
                Recipe,
                Arm,
                *SCHEDULES,
                *OPTIMIZERS,
                *MIXERS,
                *FEED_FORWARDS,
                *CONVOLUTIONS,
                *generators(),
            ),
        ),
        ("slurm/README.md", (Profile, Slurm, Job, DataJobs)),
    ],
)
def test_the_pages_name_each_key_that_a_file_may_have(page: str, tables: tuple[type[Any], ...]) -> None:
    named = set(re.findall(r"[\w-]+", " ".join(re.findall(r"`[^`\n]+`", (ROOT / page).read_text()))))
    keys = {field.name: table.__name__ for table in tables for field in dataclasses.fields(table)}
    keys |= {table.kind: table.__name__ for table in tables if hasattr(table, "kind")}
    assert {key: table for key, table in keys.items() if key not in named} == {}


def test_no_test_cites_a_file_outside_the_repository() -> None:
    outside = re.compile(r"(?<![\w.])\.\./(?:\w+/)*\w+\.(?:md|py|csv|txt)")
    cited = {path.name: outside.findall(path.read_text()) for path in sorted((ROOT / "tests").glob("*.py"))}
    assert {name: found for name, found in cited.items() if found} == {}
