"""Lists in rows of metrics: histograms of scores and of their staleness, and the hardest examples. Imports no jax."""

SCORES, STALENESS = "scores/histogram", "scores/staleness_histogram"
HARDEST = "scores/hardest"  # indices of the examples with the largest scores, the largest first

# A bin holds what is >= its edge and < the next: what is below the octaves, zero included; octaves; all float32 above.
SCORE_EDGES = (0.0, *(2.0**exponent for exponent in range(-24, 9)), 2.0**128)
# Steps: 0, 1, 2 to 3, 4 to 7, ...; and all above, as steps are below 2^30.
STALENESS_EDGES = (0.0, *(2.0**exponent for exponent in range(21)), 2.0**30)
EDGES = {SCORES: SCORE_EDGES, STALENESS: STALENESS_EDGES}


def known_counts(row: dict, name: str) -> list[int] | None:
    """Returns the counts of a histogram in a row of metrics; None if the row has none that fits the edges.

    Args:
      row: of metrics, of any version.
      name: SCORES or STALENESS.

    Example:
      >>> known_counts({"step": 0}, SCORES) is None, known_counts({"step": 0, SCORES: [1, 2]}, SCORES) is None
      (True, True)
    """
    counts = row.get(name)
    return counts if isinstance(counts, list) and len(counts) == len(EDGES[name]) - 1 else None
