"""One run in one folder: the loop, checkpoints, metrics, supervision."""
