"""The mean of several checkpoints of one run's ends: better than each of them in every skill (see README.md).

    python -m tools.tiny.average OUT.pt RUN_A/masters.pt RUN_B/masters.pt [--drafting RUN2/masters.pt]

The MTP block, which the trunk's runs do not train, is taken from --drafting.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch


def average(states: list[dict[str, Any]]) -> dict[str, Any]:
    """The last state with every float weight replaced by the mean over all; tables of experts are the same in each."""
    mean: dict[str, Any] = dict(states[-1])
    weights = [state["masters"] for state in states]
    mean["masters"] = {
        name: sum(each[name] for each in weights) / len(weights) if value.is_floating_point() else value
        for name, value in weights[-1].items()
    }
    return mean


def main() -> None:
    parser = argparse.ArgumentParser(description="Average checkpoints.")
    parser.add_argument("out")
    parser.add_argument("masters", nargs="+")
    parser.add_argument("--drafting")
    options = parser.parse_args()
    found = average([torch.load(path) for path in options.masters])
    if options.drafting:
        trained = torch.load(options.drafting)["masters"]
        found["masters"].update({name: value for name, value in trained.items() if name.startswith("mtp.")})
    torch.save(found, options.out)


if __name__ == "__main__":
    main()
