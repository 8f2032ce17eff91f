"""Hardest and easiest examples of a run, and its classes, as part of a page."""

import pathlib
from collections.abc import Iterator, Sequence

from issgd_jax.errors import InputError
from issgd_jax.view import page, scored
from issgd_jax.view.page import Element, tag

_EXAMPLES = 12


def gallery(name: str, folder: pathlib.Path) -> Iterator[Element]:
    """Yields the examples and classes of a run, or why they cannot be shown.

    Args:
      name: of the run.
      folder: of the run.
    """
    yield tag("h3", name)
    try:
        found = scored.read(folder, _EXAMPLES)
    except InputError as error:
        yield tag("p", f"The scores cannot be shown: {error}")
        return
    yield tag(
        "p",
        f"At step {found.step:,}, {found.half:.1%} of the examples with a score have half of the sum of all scores. "
        "The hardest teach most, or are mislabelled; the easiest are learned. Staleness: steps since the parameters "
        "that gave the score. Drawn: how often the example was in a minibatch.",
    )
    if found.missing:
        yield tag("p", f"There are no images: {found.missing}.")
    yield from _examples("Hardest examples", found.hardest, name)
    yield from _examples("Easiest examples", found.easiest, name)
    if found.classes:
        yield page.table(
            f"Classes of {name}: share of draws, if they were in proportion to the scores",
            ("class", "examples", "share of examples", "mean score", "share of draws"),
            [
                (str(c.label), f"{c.examples:,}", f"{c.examples / found.num_examples:.1%}", f"{c.mean:.3g}",
                 f"{c.share:.1%}")
                for c in found.classes
            ],
            numbers=True,
        )  # fmt: skip


def _examples(title: str, found: Sequence[scored.Example], name: str) -> Iterator[Element]:
    """Yields images with their figures, or a table where there are none."""
    if not found[0].png:
        header = ("index", "label", "score", "staleness", "drawn")
        rows = [
            (f"{e.index}", _known(e.label), f"{e.score:.4g}", f"{e.staleness:,}", _known(e.times_drawn)) for e in found
        ]
        yield page.table(f"{title} of {name}", header, rows, numbers=True)
        return
    yield tag("h4", title)
    yield tag("ul", *map(_example, found), class_="examples")


def _example(example: scored.Example) -> Element:
    alt = f"Training example {example.index}, label {example.label}, score {example.score:.3g}"
    return tag(
        "li",
        page.image(example.png, alt),
        tag("b", f"label {example.label}"),
        tag("br"),
        f"score {example.score:.3g}",
        tag("br"),
        f"staleness {example.staleness:,}",
        tag("br"),
        *(() if example.times_drawn is None else (f"drawn {example.times_drawn:,} times", tag("br"))),
        f"#{example.index}",
    )


def _known(number: int | None) -> str:
    return "–" if number is None else f"{number:,}"
