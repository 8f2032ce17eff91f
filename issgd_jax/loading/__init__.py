"""Data on the host: rows of any source, and minibatches that are gathered ahead of the learner."""
