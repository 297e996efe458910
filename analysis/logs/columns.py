"""Maps the column names of tables from other sources to ours, with the help of the option --columns.

A column is recognised by our name for it (schema.RUN_COLUMNS), by N, D or C, or by one of its usual names in any
spelling: "Val Loss", "val/loss" and "summary.val_loss" are the same name. If two columns could both be, say, the loss,
and their values differ, the table is refused, since only the user knows which one is meant.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.logs.schema import RUN_COLUMNS

if TYPE_CHECKING:
    import pandas as pd

SHORT_NAMES = {
    "N": "parameters",
    "N_nonemb": "parameters_nonembedding",
    "N_active": "parameters_active",
    "D": "tokens",
    "C": "flops_given",
}
POINT_COLUMNS = {  # the columns of a table of points, and their types
    **RUN_COLUMNS,
    "train.learning_rate": "float64",
    "flops_given": "float64",
    "loss_unit": "string",
}
USUAL_NAMES = {  # our name -> usual names, in lower case with _ between words
    "run_id": ("run_id", "sys_id", "trial_id", "id"),
    "arm": ("arm", "variant", "architecture", "model"),
    "size": ("size", "model_size", "scale", "rung"),
    "budget": ("budget",),
    "seed": ("seed", "random_seed"),
    "parameters": ("parameters", "params", "n_params", "num_params", "n_parameters", "num_parameters", "total_params"),
    "parameters_nonembedding": (
        "parameters_nonembedding",
        "n_nonemb",
        "n_nonembedding",
        "non_embedding_params",
        "nonembedding_params",
        "non_embedding_parameters",
    ),
    "parameters_active": ("parameters_active", "n_active", "active_params", "active_parameters"),
    "tokens": ("tokens", "n_tokens", "num_tokens", "training_tokens", "train_tokens", "total_tokens"),
    "flops_given": ("flops_given", "flops", "compute", "flop", "training_flop", "training_flops", "train_flops"),
    "train.learning_rate": ("train.learning_rate", "train_learning_rate", "learning_rate", "lr"),
    "loss": (
        "loss",
        "final_loss",
        "val_loss",
        "valid_loss",
        "validation_loss",
        "eval_loss",
        "test_loss",
        "held_out_loss",
        "heldout_loss",
    ),
    "bits_per_byte": ("bits_per_byte", "bpb", "val_bpb", "eval_bpb"),
    "vocabulary": ("vocabulary", "vocab_size", "vocabulary_size", "n_vocab"),
    "gradient_norm": ("gradient_norm", "grad_norm"),
    "tokenizer_sha256": ("tokenizer_sha256", "tokenizer"),
    "data_sha256": ("data_sha256", "data", "dataset"),
    "status": ("status", "state", "run_state", "sys_state", "done", "finished"),
}
EXACT = {"n": "parameters", "d": "tokens", "c": "flops_given"}  # too short to be recognised after a tracker's prefix
# For these, a column with our own name is preferred: a table with a column "arm" may use "model" for the size.
PREFERRED = ("run_id", "arm", "size", "tokenizer_sha256", "data_sha256", "status")
# Prefixes that trackers add to names: W&B and Ray Tune "config/", MLflow "params." and "metrics.", Optuna "params_".
_PREFIX = re.compile(
    r"(config|summary|summary_metrics|params?|parameters|metrics|hparams|hyperparameters|user_attrs|cfg|args)[./_]",
    re.I,
)
# Prefixes that trackers add to measured values. These are not facts of a run, although their names contain a dot.
_MEASURED = re.compile(r"(summary|summary_metrics|metrics|tags|system|eval|val|valid|validation|test)\.", re.IGNORECASE)
UNITS = {  # of a loss, by the name of the column that holds it
    r"bits?_per_byte|bpb": "bits/byte",
    r"bits?_per_(char|character)|bpc": "bits/character",
    r"bits?_per_token|bits?": "bits/token",
    r"nats?_per_byte": "nats/byte",
}
NATS = "nats/token"


def plain(name: str) -> str:
    """A name in lower case, with one _ for any signs between its words: "Val Loss" and "val/loss" are val_loss."""
    return re.sub(r"[^\w]+|_+", "_", name.strip().lower()).strip("_")


def without_prefix(name: str) -> str:
    """A tracker's "config/seed" or "params.seed.value" as "seed"."""
    bare = _PREFIX.sub("", name.strip(), count=1) if _PREFIX.match(name.strip()) else name.strip()
    return bare.removesuffix(".value")


def measured(name: str) -> str:
    """The name of a measured value without a dot, such as "metrics/accuracy" for "metrics.accuracy", since names with a
    dot are facts (schema.fact_columns). Other names are returned as they are."""
    return name.replace(".", "/") if _MEASURED.match(name) else name


def renaming(path: Path, raw: pd.DataFrame, columns: Mapping[str, str]) -> dict[str, str]:
    """A mapping from the table's column names to ours: as given in `columns` (N, D, C or our name -> theirs), else by
    usual names.

    Raises ValueError for names that the table lacks, and for two columns that could be the same quantity and differ.
    """
    names = [str(name) for name in raw.columns]
    chosen: dict[str, str] = {}
    for wanted, theirs in columns.items():
        target = SHORT_NAMES.get(wanted, wanted)
        if target not in POINT_COLUMNS and "." not in target:
            known = ", ".join((*SHORT_NAMES, *POINT_COLUMNS))
            raise ValueError(f"--columns: no column {wanted!r} is known; known are {known}, and facts as conv.width")
        if theirs not in names:
            raise ValueError(f"{path} has no column {theirs!r}; it has {', '.join(names)}")
        if theirs in chosen:
            raise ValueError(f"--columns gives column {theirs!r} two names; give it one")
        chosen[theirs] = target
    candidates: dict[str, dict[int, list[str]]] = {}  # target -> preference -> their names
    for name in names:
        target, preference = _target(name)
        if name not in chosen and target not in chosen.values() and target:
            candidates.setdefault(target, {}).setdefault(preference, []).append(name)
    for target, by_preference in candidates.items():
        found = [name for _, same in sorted(by_preference.items()) for name in same]
        if target == "run_id" or (target in PREFERRED and found[0] == target):
            found = found[:1]
        different = [name for name in found[1:] if not _same(raw[found[0]], raw[name])]
        if different:
            short = next((short for short, ours in SHORT_NAMES.items() if ours == target), target)
            raise ValueError(
                f"{path}: columns {found[0]!r} and {different[0]!r} could both be {short} and differ; "
                f"say which with --columns {short}=..."
            )
        chosen[found[0]] = target
    return chosen


def _target(name: str) -> tuple[str, int]:
    """Our name for a column ("" for none), and its rank among the usual names, where -1 is our own name."""
    if name in POINT_COLUMNS:
        return name, -1
    if name.strip().lower() in EXACT:
        return EXACT[name.strip().lower()], 0
    word = plain(without_prefix(name))
    for target, usual in USUAL_NAMES.items():
        for known in (word, plain(name)):
            if known in usual:
                return target, usual.index(known)
    return "", 0


def _same(one: pd.Series, other: pd.Series) -> bool:
    cells = [column.astype(object).where(column.notna(), None) for column in (one, other)]
    return all(a == b for a, b in zip(*cells, strict=True))


def unit_of(path: Path, column: str) -> str:
    """The unit of a loss, from the name of its column: nats a token unless the name contains bits, byte or character.

    Raises ValueError for a perplexity, since the loss is its logarithm.
    """
    word = plain(column)
    if re.search(r"(^|_)(perplexity|ppl)(_|$)", word):
        raise ValueError(f"{path}: column {column!r} is a perplexity; add a column of its logarithm, which is the loss")
    for pattern, unit in UNITS.items():
        if re.search(rf"(^|_)({pattern})(_|$)", word):
            return unit
    return NATS


def loss_unit(runs: pd.DataFrame) -> str:
    """The unit of a run table's loss, for axes and sentences: "nats/token" unless the table says otherwise."""
    units = runs["loss_unit"].dropna().unique() if "loss_unit" in runs else []
    return str(units[0]) if len(units) else NATS


def parse_columns(texts: Iterable[str]) -> dict[str, str]:
    """Parse the values of --columns, which may be given several times: NAME=COLUMN,...; a name with a comma is quoted,
    as in C="flops, train". Raises ValueError for anything else."""
    columns: dict[str, str] = {}
    for text in texts:
        split = shlex.shlex(text, posix=True, punctuation_chars=False)
        split.whitespace, split.whitespace_split, split.escape, split.commenters = ",", True, "", ""
        try:
            items = list(split)
        except ValueError:
            raise ValueError(f"--columns has a quote that does not end; got {text!r}") from None
        for item in items or [""]:
            ours, equals, theirs = (part.strip() for part in item.partition("="))
            if not (ours and equals and theirs):
                raise ValueError(f"--columns takes NAME=COLUMN,...; got {item!r}")
            if ours in columns:
                raise ValueError(f"--columns names two columns for {ours}; give one")
            columns[ours] = theirs
    return columns


def format_columns(columns: Mapping[str, str]) -> list[str]:
    """The command-line arguments that give `columns` ([] for none); the inverse of `parse_columns`."""
    items = []
    for ours, theirs in columns.items():
        quoted = f'"{theirs}"' if '"' not in theirs else shlex.quote(theirs)
        items.append(f"{ours}={quoted}" if re.search(r"""[,"']""", theirs) else f"{ours}={theirs}")
    return ["--columns", ",".join(items)] if items else []
