"""Two sets of runs that differ in one thing, each with several seeds: mean quality on test groups and the difference.

The runs must have been evaluated (`perlhf evaluate RUN`) on the same records. The interval of the difference is over
groups, the same for both, and seeds. Prints one JSON line.
Run: python scripts/compare_seeds.py --first runs/grouped-0 runs/grouped-1 --second runs/shuffled-0 runs/shuffled-1
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from perlhf.comparison.results import mean_with_spread, tested_by
from perlhf.method.metrics import seed_noise
from perlhf.runs.read import read_runs, summarise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=Path, nargs="+", required=True, help="evaluated runs, one a seed")
    parser.add_argument("--second", type=Path, nargs="+", required=True, help="evaluated runs, one a seed")
    parser.add_argument("--bootstrap", type=int, default=1000, help="resamples of groups")
    arguments = parser.parse_args()
    found = {}
    sides = {name: read_runs(getattr(arguments, name)) for name in ("first", "second")}
    tested = {name: [tested_by(run) for run in runs] for name, runs in sides.items()}
    if len({(one.metric, tuple(one.groups)) for runs in tested.values() for one in runs}) > 1:
        parser.error("the runs were tested on other records, or by other metrics")
    for name, runs in sides.items():
        values = [line.quality.value for run in runs if (line := summarise(run)).quality is not None]
        seconds = [line.seconds for run in runs if (line := summarise(run)).seconds is not None]
        found[name] = {"metric": tested[name][0].metric, "seeds": values, "mean": sum(values) / len(values)}
        found[name] |= {"tokens": [run.result.get("tokens") for run in runs], "seconds": seconds}
    noise = seed_noise(found[name]["seeds"] for name in tested)
    found["seed_noise"] = None if noise is None else asdict(noise)
    first, second = ([run.value for run in tested[name]] for name in ("first", "second"))
    groups = tested["first"][0].groups
    found["difference"] = asdict(mean_with_spread(first, second, groups, noise, arguments.bootstrap, 0)[0])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
