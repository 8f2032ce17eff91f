"""What `issgd-jax potential` says of the study's data, beside what training then gave.

    python -m experiments.paper.potential [--data=digits,fashion_mnist,svhn] [--data_dir=...]

Measures after an epoch of uniform draws at their own best rate of the study `fair` (of `text`, `language`), with the
study's network. Prints what was measured of all data, and writes results/potential.json.
"""

import argparse
import dataclasses
import json

from experiments.benchmarks.environment import save_results
from experiments.paper import results, studies, table
from issgd_jax.prospect import measure

PATH = results.FOLDER / "potential.json"
ARM, BASELINE = "calibrated_refresh", "uniform"


def measured(data: str, data_dir: str | None) -> dict:
    """Returns the potential of one data set, and what refresh alone gave in the study."""
    name = "language" if data == "text" else "fair"
    record = results.load(name, data)
    study, arms = studies.get_study(name), record["arms"]
    config = study.config(
        BASELINE, data, overrides={"data.dir": data_dir}, learning_rate=arms[BASELINE]["learning_rate"], seed=0
    )
    found = measure(config)
    rows = {row["arm"]: row for row in table.make_rows(record, {})}
    sgd, refresh = (rows[arms[arm]["label"]] for arm in (BASELINE, ARM))
    return dataclasses.asdict(found) | {
        "removable_share": found.removable_share,
        "verdict": found.verdict,
        "study": {"steps of SGD": sgd["steps"], "steps": refresh["steps"], "final loss / SGD's": refresh["ratio"]},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits,fashion_mnist,svhn", help="names, separated by commas")
    parser.add_argument("--data_dir", help="TFDS folder of the data")
    options = parser.parse_args()
    found = json.loads(PATH.read_text())["results"] if PATH.exists() else {}
    for data in options.data.split(","):
        found[data] = measured(data, options.data_dir)
        save_results(PATH, "python -m experiments.paper.potential", found)
    for data, result in found.items():
        print(f"{data}: {json.dumps(result, indent=1, ensure_ascii=False)}")


if __name__ == "__main__":
    main()
