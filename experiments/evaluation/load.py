"""Load a trained run as a torch module, with its tokenizer."""

import contextlib
import hashlib
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer

from analysis.errors import first_line
from analysis.logs.files import file_sha256, read_json
from analysis.logs.record import check_unedited
from experiments.data import tokenizer as bpe
from experiments.design.config import RunConfig
from experiments.design.data import DataConfig
from experiments.models.decoder import Decoder
from experiments.training.precision import mixed_precision
from experiments.training.record import TOKENIZER, read_record

_REMEDY = "copy it again, or train the run again in another store"


class TrainedRun(NamedTuple):
    """A finished run: its configuration, its model in evaluation mode with float32 weights, and its tokenizer."""

    config: RunConfig
    model: Decoder
    tokenizer: Tokenizer

    @property
    def device(self) -> torch.device:
        return self.model.embedding.weight.device

    @property
    def data(self) -> DataConfig:
        """The text that the run was trained on."""
        assert self.config.data is not None, "load_run takes runs on text only"
        return self.config.data

    @property
    def end_of_text(self) -> int:
        """The token that ends a document."""
        number = self.tokenizer.token_to_id(self.data.end_of_text)
        assert number is not None, "a dataset is only built with a tokenizer that has it"
        return int(number)

    @property
    def coder(self) -> bpe.Coder:
        """The tokenizer as the data were encoded by it."""
        return bpe.load(self.tokenizer.to_str().encode(), self.data.vocabulary, self.data.end_of_text)


def check_finished(run_dir: Path) -> RunConfig:
    """The configuration of the run in this folder. Raises ValueError if it is no run, or not finished."""
    if not (run_dir / "config.json").exists():
        raise ValueError(f"{run_dir} must be the folder of a run, STORE/RUN_ID; it has no config.json; name another")
    _, config, _ = read_record(run_dir)
    if not (run_dir / "run.json").exists():
        raise ValueError(f"{run_dir} is not finished; `dynconv status` says where it stands")
    return config


def check_usable(run_dir: Path) -> RunConfig:
    """The configuration of the run in this folder. Raises ValueError if it is not finished, or cannot score a text."""
    config = check_finished(run_dir)
    if config.model.sequence_group > 1:
        raise ValueError(
            f"{run_dir} is a control whose sequences read one another; use a run of its arm without mismatched"
        )
    if config.task is not None:
        raise ValueError(
            f"{run_dir} has no tokenizer, as it was trained on {config.task_name}; give a run on text, or "
            "`eval --lengths` for its own task"
        )
    return config


def load_run(run_dir: Path | str, device: str = "cpu") -> TrainedRun:
    """The run in this folder. Raises ValueError as `check_usable` does, and if its weights or tokenizer are damaged, or
    are not its own."""
    run_dir = Path(run_dir)
    config = check_usable(run_dir)
    tokenizer = _tokenizer(run_dir)
    return TrainedRun(config, load_model(run_dir, config, device), tokenizer)


def load_model(run_dir: Path, config: RunConfig, device: str = "cpu") -> Decoder:
    """The model of a finished run, in evaluation mode. Raises ValueError if its weights are damaged or not its own."""
    model = Decoder(config.model, config.seed)
    weights = _weights(run_dir / "model.pt")
    shapes, wanted = ({name: each.shape for name, each in of.items()} for of in (weights, model.state_dict()))
    if shapes != wanted:
        unlike = [name for name in wanted | shapes if shapes.get(name) != wanted.get(name)]
        raise ValueError(
            f"{run_dir / 'model.pt'} holds the weights of another model: {len(unlike)} are not as config.json has "
            f"them, the first {unlike[0]}; {_REMEDY}"
        )
    _check_own(run_dir)
    model.load_state_dict(weights)
    return model.to(device).eval()


def _tokenizer(run_dir: Path) -> Tokenizer:
    """The tokenizer that the run was trained with. Raises ValueError if it is missing, or is another one now."""
    path = run_dir / TOKENIZER
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} is missing ({error.strerror}); {_REMEDY}") from None
    if hashlib.sha256(content).hexdigest() != read_record(run_dir)[0]["tokenizer_sha256"]:
        raise ValueError(f"{path} is not the tokenizer that the run was trained with: its checksum differs; {_REMEDY}")
    tokenizer = Tokenizer.from_buffer(content)
    tokenizer.encode_special_tokens = True  # as in training: the end of text, where it is spelt out, is text
    return tokenizer


def _check_own(run_dir: Path) -> None:
    """Raises ValueError if model.pt is another file than the one of which run.json has the checksum.

    The weights of another seed have the same names and shapes. The run.json of older versions has no checksum.
    """
    path, record = run_dir / "model.pt", run_dir / "run.json"
    run = read_json(record)
    check_unedited(record, run)
    if run.get("run_id", run_dir.name) != run_dir.name:
        raise ValueError(
            f"{record} is of run {run['run_id']}; wanted {run_dir.name}, as its folder is named; {_REMEDY}"
        )
    written = run.get("weights_sha256")
    if written is not None and written != file_sha256(path):
        raise ValueError(
            f"{path} is not what this run wrote, by weights_sha256 in run.json, but weights of another run or another "
            f"training of it; {_REMEDY}"
        )


def _weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file that the trainer wrote. Raises ValueError if it is missing or damaged.

    The file is a zip archive with a checksum of each tensor, which torch.load does not compare.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"{path} is damaged (the checksum of {damaged} differs); {_REMEDY}")
        weights: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is missing or damaged ({first_line(error)}); {_REMEDY}") from None
    return weights


def precision(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """A context with the arithmetic of training on this device: bfloat16 on a GPU, float32 on a CPU."""
    return mixed_precision(device) if device.type == "cuda" else contextlib.nullcontext()
