"""Reads logs of schema 1 as schema 2. This is the only module that knows the format of old stores.

Schema 1 described an arm by a fixed list of columns, taken from the model's frozen configuration, logged an evaluation
as one row with its loss and bits per byte, and kept the device of a run's last attempt only. It trained on text alone,
and no model of it had experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from analysis.logs.provenance import summarize
from analysis.logs.schema import EVAL_COLUMNS, RUN_COLUMNS, arrow_schema

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

SCHEMA = 1
TASK = "text"
METRICS = ("loss", "bits_per_byte")
FACT_NAMES = {  # column of schema 1 -> fact
    "kind": "conv.kind",
    "site": "conv.sites",
    "width": "conv.width",
    "rank": "conv.rank",
    "head_size": "conv.head_size",
    "residual": "conv.residual",
    "static_filter": "conv.static_filter",
    "qk_norm": "attention.qk_norm",
    "kv_heads": "attention.kv_heads",
}
FACTS_OF_KIND = {  # the facts that each kind of convolution had, beside its sites
    "static": ("width", "residual"),
    "headwise": ("width", "residual", "static_filter", "head_size"),
    "lowrank": ("width", "residual", "static_filter", "rank"),
}
SITES = ("q", "k", "v", "o", "gate", "up", "down")  # the linear maps of a layer, in order
ADDED = ("budget", "task", "trunk", "parameters_active", "flops_6nactive_d", "sharing", "clock")  # by schema 2


def upgrade_record(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of schema 1 with the keys of schema 2. Its budget was not recorded and stays missing."""
    return {
        **config,
        "budget": None,
        "task": TASK,
        "trunk": None,
        "parameters_active": config.get("parameters"),
        "flops_6nactive_d": config.get("flops_6nd"),
        "facts": facts(config.get("config")),
        "vary": {},
    }


def facts(config: Any) -> dict[str, Any]:
    """The facts in the model's frozen configuration; none where it declares no convolution."""
    model = config.get("model") if isinstance(config, dict) else None
    conv = model.get("conv") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(conv, dict):
        return {}
    found = {"kind": conv.get("kind")}
    if found["kind"] in FACTS_OF_KIND:
        found["site"] = _site_name(conv.get("sites") or ())
        found |= {name: conv.get(name) for name in FACTS_OF_KIND[found["kind"]]}
    found |= {name: model.get(name) for name in ("qk_norm", "kv_heads")}
    return {FACT_NAMES[name]: value for name, value in found.items() if value is not None}


def _site_name(sites: Iterable[str]) -> str | None:
    """Where the convolution is applied, in one word: "qkv", "all-linear", "k+gate"."""
    chosen = sorted(sites, key=lambda site: SITES.index(site) if site in SITES else len(SITES))
    if tuple(chosen) == SITES:
        return "all-linear"
    return ("" if all(len(site) == 1 for site in chosen) else "+").join(chosen) or None


def provenance(run: Mapping[str, Any], attempts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The columns of schema 2 on the device of a complete run. Schema 1 did not record how many runs shared a device,
    so `sharing` is missing and `clock` is never "alone".

    `attempts` may be empty where there was one, whose device run.json holds.
    """
    return summarize(attempts or [run])


def is_frozen(runs: pd.DataFrame) -> bool:
    """Whether a frozen run table was written by schema 1."""
    return not any(name in runs.columns for name in ADDED)


def upgrade_frozen(runs: pd.DataFrame) -> pd.DataFrame:
    """A frozen run table of schema 1 with the columns of schema 2. The older ones have no facts."""
    import pandas as pd

    runs = runs.rename(columns=FACT_NAMES)
    empty = [name for name in FACT_NAMES.values() if name in runs and runs[name].isna().all()]
    added = {name: pd.Series(pd.NA, index=runs.index, dtype="object") for name in ADDED}
    added |= {"task": pd.Series(TASK, index=runs.index, dtype="string")}
    added |= {"parameters_active": runs.get("parameters"), "flops_6nactive_d": runs.get("flops_6nd")}
    complete = runs["status"].eq("complete").fillna(False) if "status" in runs else pd.Series(False, index=runs.index)
    added["clock"] = pd.Series("unknown", index=runs.index, dtype="string").where(complete, pd.NA)
    upgraded = runs.drop(columns=empty).assign(**{name: column for name, column in added.items() if column is not None})
    others = [name for name in upgraded if name not in RUN_COLUMNS]
    return upgraded[[*(name for name in RUN_COLUMNS if name in upgraded), *others]]


def upgrade_evals(table: pa.Table) -> pa.Table:
    """Evaluations of schema 1 (one row each) with one row for each metric; any other table is returned as it is.

    A column run_id in front, as frozen stores have it, is kept.
    """
    import pyarrow as pa

    front = ["run_id"] if "run_id" in table.column_names else []
    old = [*front, "attempt", "step", "tokens", *METRICS, "seconds"]
    if table.column_names != old:
        return table
    rows = []
    for row in table.to_pylist():
        shared = {name: row[name] for name in (*front, "attempt", "step", "tokens")}
        metrics = {name: row[name] for name in METRICS if row[name] is not None}
        seconds = [row["seconds"], *[None] * len(metrics)]
        for (metric, value), own in zip(metrics.items(), seconds, strict=False):
            rows.append({**shared, "task": TASK, "metric": metric, "value": value, "seconds": own})
    schema = arrow_schema("evals")
    if front:
        schema = pa.schema([("run_id", pa.string()), *schema])
    assert schema.names == [*front, *EVAL_COLUMNS]
    return pa.Table.from_pylist(rows, schema=schema)
