"""Load a trained run as a torch module, with its tokenizer."""

from pathlib import Path

import torch
from tokenizers import Tokenizer

from experiments.models.decoder import Decoder
from experiments.training.record import TOKENIZER, read_record


def load_model(run_dir: Path | str, device: str = "cpu") -> tuple[Decoder, Tokenizer]:
    """The model of a finished run, in evaluation mode and float32, and its tokenizer.

    Raises ValueError if the run is not finished, or if the folder holds no run.
    """
    run_dir = Path(run_dir)
    _, run, _ = read_record(run_dir)
    if not (run_dir / "run.json").exists():
        raise ValueError(f"{run_dir} is not finished; `dynconv status` says where it stands")
    if run.task is not None:
        raise ValueError(f"{run_dir} has no tokenizer, as it was trained on {run.task_name}; give a run on text")
    model = Decoder(run.model, run.seed)
    model.load_state_dict(torch.load(run_dir / "model.pt", map_location="cpu", weights_only=True))
    return model.to(device).eval(), Tokenizer.from_file(str(run_dir / TOKENIZER))
