"""Computes the tables of docs/scaling.md from constants that other benchmarks have measured.

    python -m experiments.benchmarks.extrapolate

Reads results/{sampler,cluster,gradnorm,learner_step}.json; measures nothing.
"""

import json
import math

from experiments.benchmarks.environment import RESULTS

EXAMPLES = tuple(10**k for k in range(6, 11))
WORKERS = tuple(10**k for k in range(1, 5))
BATCH_SIZE = 256  # of the paper's network in gradnorm.json
PARAMETER_BYTES = 4 * 18_903_050  # of the paper's network
GIGABIT = 1e9 / 8
SVHN = "svhn 3072-2048x4-10, N = 573,000, B = 128"  # in learner_step.json
_UNITS = {
    "cycle at 10^6": "s",
    "cycle, more a decade": "s",
    "bytes an example": "B",
    "bytes an example while the table is rebuilt": "B more",
    "seconds an example of the table": "s",
    "scores in a second": "",
    "bytes out a second": "B",
    "leases a second": "",
    "scores a second of a worker": "",
}


def constants() -> dict[str, float]:
    """Returns the constants of the tables, in seconds and bytes."""
    sampler, cluster, gradnorm, learner_step = (
        json.loads((RESULTS / f"{name}.json").read_text())
        for name in ("sampler", "cluster", "gradnorm", "learner_step")
    )
    cycles = {int(name[4:].replace(",", "")): row for name, row in sampler["results"].items()}
    sizes = [n for n in cycles if n >= 10**6]
    # Least squares over log10 N.
    xs, ys = [math.log10(n) for n in sizes], [1e-6 * cycles[n]["microseconds"]["ours"] for n in sizes]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys)) / sum((x - mean_x) ** 2 for x in xs)
    database, ingest = cluster["database"], learner_step["results"][SVHN]
    return {
        "cycle at 10^6": mean_y + slope * (6 - mean_x),
        "cycle, more a decade": slope,
        "bytes an example": cycles[10**8]["store_and_table_bytes_an_example"],
        "bytes an example while the table is rebuilt": ingest["beside_in_ingest_bytes_an_example"],
        "seconds an example of the table": database["seconds to rebuild the table"] / database["examples"],
        "scores in a second": database["scores a second into store and table"],
        "bytes out a second": 1e9 * database["gigabytes a second to all workers"],
        "leases a second": database["leases a second"],
        "scores a second of a worker": BATCH_SIZE / (1e-3 * gradnorm["results"]["mlp"]["ours_norms"]["ms"]),
    }


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000 or unit == "TB":
            return f"{number:.3g} {unit}"
        number /= 1000
    raise AssertionError


def _seconds(number: float) -> str:
    if number < 1e-3:
        return f"{1e6 * number:.0f} µs"
    if number < 1:
        return f"{1e3 * number:.3g} ms"
    if number < 120:
        return f"{number:.3g} s"
    return f"{number / 60:.3g} min" if number < 7200 else f"{number / 3600:.3g} h"


def _count(number: int) -> str:
    return f"10^{round(math.log10(number))}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def of_examples(found: dict[str, float]) -> str:
    """Returns the table by N: memory, draw, rebuild."""
    rows = []
    for n in EXAMPLES:
        held, beside = found["bytes an example"] * n, found["bytes an example while the table is rebuilt"] * n
        draw = found["cycle at 10^6"] + found["cycle, more a decade"] * (math.log10(n) - 6)
        rebuild = found["seconds an example of the table"] * n
        rows.append([_count(n), _bytes(held), _bytes(beside), _seconds(draw), _seconds(rebuild)])
    head = ["N", "store and table", "more, while the table is rebuilt", "1,024 written, 256 drawn", "table rebuilt"]
    return _table(head, rows)


def of_workers(found: dict[str, float]) -> str:
    """By the number of machines: scores, sweep, parameters out."""
    rows = []
    for workers in WORKERS:
        scores = workers * found["scores a second of a worker"]
        entering = min(scores, found["scores in a second"])
        out = workers * PARAMETER_BYTES
        rows.append(
            [
                _count(workers),
                f"{scores:,.0f}",
                f"{scores / found['scores in a second']:.2g}",
                f"{max(1, scores / found['leases a second']):,.0f}",
                *(_seconds(n / entering) for n in (10**6, 10**8, 10**10)),
                _bytes(out),
                _seconds(out / found["bytes out a second"]),
                _seconds(out / (10 * GIGABIT)),
            ]
        )
    head = ["machines", "scores a second", "÷ what the learner takes in", "least examples a lease", "sweep of 10^6"]
    return _table([*head, "of 10^8", "of 10^10", "bytes a broadcast", "by memory", "by 10 Gbit/s"], rows)


def main():
    found = constants()
    for name, value in found.items():
        print(f"- {name}: {value:.3g} {_UNITS[name]}")
    print(f"\n{of_examples(found)}\n\n{of_workers(found)}")


if __name__ == "__main__":
    main()
