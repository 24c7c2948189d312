"""Where an adapter's weights come from, as one entry per training, oldest first (`decal.run`).

An entry holds what can be known again years later: digests, counts, losses, versions. It holds no
dates and no machines, so that the same run gives the same file to the byte, and of places on this
disk only the last name. Training that goes on with an adapter adds an entry to the earlier ones.

Each entry ends with the digest of the weights that it left behind. Weights that are no longer the
last entry's were changed by other code, a Trainer say, and get an entry that tells no more.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

from decal.config import RunConfig
from decal.model.adapter import Adapter
from decal.model.hub import may_be_on_hub
from decal.train.events import Result
from decal.untrusted import parse_json
from decal.verbs.target import RUN
from decal.version import __version__


def run_facts(config: RunConfig, info: Mapping[str, Any], result: Result) -> dict[str, Any]:
    """The entry of a finished run; `info` is its info.json. What there is not is left out."""
    source, rows, batch = config.data.path, info.get("rows"), config.train.batch_size
    on_hub = may_be_on_hub(source) and not Path(source).exists()
    facts = {
        "data": source if on_hub else Path(source).name,
        "data_sha256": info.get("data"),
        "rows": rows,
        "objective": config.objective,
        "seed": config.train.seed,
        "steps": result.steps,
        "kept_step": result.kept_step,
        "epochs": None if rows is None else round(result.steps / ceil(rows / batch), 3),
        "trained_tokens": result.trained_tokens,
        "loss": result.loss,
        "eval_loss": result.eval_loss,
        "best_eval_loss": result.best_eval_loss,
        **{name: info.get(name) for name in ("decal", "torch", "transformers")},
    }
    return {name: value for name, value in facts.items() if value is not None}


def history(
    earlier: Sequence[Mapping[str, Any]], adapter: Adapter, run: Mapping[str, Any] | None
) -> str | None:
    """The metadata of an adapter that is about to be saved; None for one without a past.

    Args:
        earlier: entries of the adapter that training went on with.
        run: what `run_facts` says of the run that has just ended, if one has.
    """
    runs, weights = [dict(entry) for entry in earlier], adapter.digest()
    if run is not None:
        runs.append({**run, "weights_sha256": weights})
    elif runs and runs[-1].get("weights_sha256") != weights:
        changed = {"changed": "by other code than decal train", "decal": __version__}
        runs.append({**changed, "weights_sha256": weights})
    return json.dumps(runs) if runs else None


def runs_of(metadata: Mapping[str, str]) -> list[dict[str, Any]]:
    """The entries of an adapter's metadata; empty where there are none that can be read."""
    try:
        found = parse_json(metadata.get(RUN, "[]"))
    except ValueError:
        return []
    whole = isinstance(found, list) and all(isinstance(entry, dict) for entry in found)
    return found if whole else []
