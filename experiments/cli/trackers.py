"""The verb that feeds run trackers from the logs of a store: track."""

import argparse
import time
from pathlib import Path

from experiments.cli.arguments import Subparsers, add_verb, folder_name, require_folder
from experiments.terminal import warn

FOLLOW_SECONDS = 10.0


def register(subparsers: Subparsers) -> None:
    """Add the verbs of this file."""
    verb = add_verb(
        subparsers,
        "track",
        _track,
        "export the logs of a store for TensorBoard or Weights & Biases; repeated, it adds what is new",
        "results/runs/demo --to tensorboard -o boards        # then: tensorboard --logdir boards",
        "results/runs/demo --to tensorboard -o boards -f     # goes on while runs train",
        "results/runs/demo --to wandb -o boards              # then: wandb sync boards/*/wandb/offline-run-*",
    )
    verb.add_argument("store", type=Path, metavar="STORE", help="the folder that `submit` fills")
    text = "wandb works offline, unless WANDB_MODE says otherwise"
    verb.add_argument("--to", choices=("tensorboard", "wandb"), required=True, help=text)
    verb.add_argument("-o", "--output", type=folder_name, required=True, metavar="DIR", help="gets a folder a run")
    verb.add_argument("-f", "--follow", action="store_true", help="go on until no run is queued or running")


def _track(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from analysis.logs.store import refuse_folder_of_stores
    from experiments.launching import overview, states
    from experiments.launching.trackers import export

    require_folder(args.output)
    told: set[str] = set()
    while True:
        run_ids = states.find(args.store)
        if not run_ids:
            refuse_folder_of_stores(args.store)
            raise ValueError(f"{args.store} holds no runs; give a store that `submit` fills, not a frozen one")
        going_on = args.follow and overview.unfinished(states.read(args.store, run_ids))
        entries = runs = 0
        for run_id in tqdm(run_ids, desc="runs", delay=2, leave=False):
            try:
                count = export(args.store / run_id, args.output / run_id, args.to)
            except ValueError as error:
                if str(error) not in told:
                    warn(f"{run_id}: {error}")
                told.add(str(error))
                continue
            entries, runs = entries + count, runs + (count > 0)
        if runs or not args.follow:
            print(f"{args.output}: {entries} entries of {runs} runs, of {len(run_ids)} in {args.store}", flush=True)
        if not going_on:
            return 1 if told else 0
        time.sleep(FOLLOW_SECONDS)
