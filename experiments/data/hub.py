"""Data sets and tokenizers of the Hugging Face hub, at a pinned commit: `hub:OWNER/NAME@COMMIT?config=C&split=S`.

With `files=PATTERN` the files are named directly; else the data set's card says which belong to a configuration and
split (huggingface.co/docs/hub/datasets-manual-configuration). They are downloaded to the hub's own cache, once, by the
library huggingface_hub, and a folder of links in ours holds those that were asked for, and no others.
"""

import dataclasses
import hashlib
import json
import re
import shutil
import socket
import tempfile
import urllib.parse
from pathlib import Path
from typing import Any, NamedTuple

from analysis.errors import WorkFailed, first_line
from analysis.logs.files import read_json
from experiments.design.data import DataConfig

PREFIX = "hub:"
PLACES = ("source", "validation_source", "tokenizer")
PLACE = re.compile(r"hub:(?P<repository>[\w.-]+/[\w.-]+)@(?P<commit>[0-9a-f]{40})(?:\?(?P<query>.*))?")
KEYS = ("config", "split", "files")
ORIGIN = "origin.json"
FILES = "files"
CARD = "README.md"
TOKENIZER = "tokenizer.json"


class Place(NamedTuple):
    repository: str
    commit: str
    config: str | None
    split: str
    files: tuple[str, ...]  # patterns; none: the card decides


def localise(spec: DataConfig, cache: Path) -> DataConfig:
    """The same data, with what lies on the hub downloaded. Raises ValueError for a bad place, or if huggingface_hub is
    not installed; WorkFailed if the hub does not give the files."""
    places: dict[str, Any] = {}
    for name in PLACES:
        place = getattr(spec, name)
        if place is not None and place.startswith(PREFIX):
            places[name] = str(_fetch(name, place, cache))
    return dataclasses.replace(spec, **places) if places else spec


def origins(spec: DataConfig) -> dict[str, Any]:
    """Key of a localised specification -> repository, commit, licence and number of files of what came from the hub."""
    found = {}
    for name in PLACES:
        path = Path(getattr(spec, name) or "")
        folder = path.parent.parent if name == "tokenizer" else path.parent
        if folder.name.startswith(".hub-") and (folder / ORIGIN).exists():
            found[name] = read_json(folder / ORIGIN)
    return found


def parse(place: str) -> Place:
    """Raises ValueError for one without a whole commit, or with keys that there are not."""
    found = PLACE.fullmatch(place)
    query = urllib.parse.parse_qs(found["query"] or "", keep_blank_values=True) if found else {}
    if found is None or not set(query) <= set(KEYS):
        raise ValueError(
            "what lies on the hub must be named as hub:OWNER/NAME@COMMIT, with all 40 digits, as a branch would be "
            f"other data tomorrow, and perhaps with ?config=C&split=S or ?files=PATTERN; got {place!r}; the commit "
            'stands on the page of the data set, under "Files and versions"'
        )
    for key in ("config", "split"):
        if len(query.get(key, [])) > 1 or (key in query and "files" in query):
            raise ValueError(f"{place} must name one {key}, or files; got more; remove some")
    config, split = (query.get(key, [None])[0] for key in ("config", "split"))
    return Place(found["repository"], found["commit"], config, split or "train", tuple(query.get("files", ())))


def _fetch(name: str, place: str, cache: Path) -> Path:
    """The folder of links to the files of a data set, or the link to a tokenizer."""
    wanted = parse(place)
    target = cache / f".hub-{hashlib.sha256(json.dumps([name == 'tokenizer', wanted]).encode()).hexdigest()[:16]}"
    result = target / FILES / TOKENIZER if name == "tokenizer" else target / FILES
    if _is_whole(target):
        return result
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError(
            f"{name} lies on the Hugging Face hub and needs huggingface_hub; got none; pip install '.[hub]'"
        ) from None
    kind = "model" if name == "tokenizer" else "dataset"
    try:
        listed = huggingface_hub.HfApi().repo_info(wanted.repository, revision=wanted.commit, repo_type=kind)
        names = sorted(file.rfilename for file in listed.siblings or ())
        about = _card(huggingface_hub, wanted, kind) if CARD in names else {}
        chosen = [TOKENIZER] if name == "tokenizer" else _chosen(place, wanted, names, about)
        folder = Path(
            huggingface_hub.snapshot_download(
                wanted.repository, revision=wanted.commit, repo_type=kind, allow_patterns=chosen
            )
        )
    except (huggingface_hub.errors.HfHubHTTPError, huggingface_hub.errors.LocalEntryNotFoundError, OSError) as error:
        raise WorkFailed(f"the hub must give {place}; got {type(error).__name__}: {first_line(error)}") from error
    if missing := [each for each in chosen if not (folder / each).exists()]:
        raise WorkFailed(f"the hub must give all files of {place}; got no {missing[0]}; try again")
    cache.mkdir(parents=True, exist_ok=True)
    working = Path(tempfile.mkdtemp(prefix=f".hub.{socket.gethostname()}.", dir=cache))
    try:
        for each in chosen:
            link = working / "new" / FILES / each
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to((folder / each).resolve())
        origin = {
            "place": place,
            "repository": wanted.repository,
            "commit": wanted.commit,
            "licence": about.get("license"),
            "files": len(chosen),
        }
        (working / "new" / ORIGIN).write_text(json.dumps(origin, indent=1) + "\n")
        if target.exists():  # under another name, since another process may put a new one in its place meanwhile
            target.replace(working / "old")
        try:
            (working / "new").replace(target)
        except OSError:  # another process was faster
            if not _is_whole(target):
                raise
    finally:
        shutil.rmtree(working, ignore_errors=True)
    return result


def _is_whole(target: Path) -> bool:
    """Whether the folder is there, and none of its links leads nowhere."""
    return target.exists() and all(path.exists() for path in target.rglob("*"))


def _card(huggingface_hub: Any, wanted: Place, kind: str) -> dict[str, Any]:
    """What the block of YAML at the top of a repository's card says."""
    path = huggingface_hub.hf_hub_download(wanted.repository, CARD, revision=wanted.commit, repo_type=kind)
    text = Path(path).read_text(encoding="utf-8")
    about: dict[str, Any] = huggingface_hub.RepoCard(text, ignore_metadata_errors=True).data.to_dict()
    return about


def _chosen(place: str, wanted: Place, names: list[str], about: dict[str, Any]) -> list[str]:
    """The files of a configuration and split, or of patterns. Raises ValueError if there are none, or it is not clear
    which: files of test data must not be among those of training."""
    patterns = list(wanted.files) or _patterns(place, wanted, about, names)
    expressions = [re.compile(_expression(pattern)) for pattern in patterns]
    chosen = [name for name in names if any(expression.fullmatch(name) for expression in expressions)]
    if not chosen:
        raise ValueError(
            f"{place} must have files that fit {', '.join(patterns)}; got {_some(names)}; mend the pattern"
        )
    return chosen


def _patterns(place: str, wanted: Place, about: dict[str, Any], names: list[str]) -> list[str]:
    configs = {str(each.get("config_name", "default")): each for each in about.get("configs") or ()}
    default = [name for name, each in configs.items() if each.get("default") or len(configs) == 1 or name == "default"]
    name = wanted.config or (default[0] if default else None)
    if not configs:
        raise ValueError(
            f"the card of {place} must say which files are which; got no configs; name them, ?files=PATTERN, among "
            f"{_some(names)}"
        )
    if name not in configs:
        raise ValueError(f"{place} must name a config of the card; got {name}; it has {', '.join(sorted(configs))}")
    files = configs[name].get("data_files", ())
    if isinstance(files, str) or (isinstance(files, list) and all(isinstance(each, str) for each in files)):
        files = [{"split": "train", "path": files}]
    splits: dict[str, list[str]] = {}
    for each in files:
        paths = each["path"]
        splits.setdefault(str(each["split"]), []).extend([paths] if isinstance(paths, str) else paths)
    if wanted.split not in splits:
        raise ValueError(
            f"{place} must name a split of config {name}; got {wanted.split}; it has "
            f"{', '.join(sorted(splits)) or 'none'}"
        )
    base = str(configs[name].get("data_dir", ""))
    return [f"{base}/{pattern}" if base else pattern for pattern in splits[wanted.split]]


def _expression(pattern: str) -> str:
    """A pattern of paths as a regular expression: * and ? stay within a folder, ** crosses folders."""
    special = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern.removeprefix("./"))
    return "".join(special.get(part) or re.escape(part) for part in parts)


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "no files"
