"""The learning task: data, models, losses, and the problem that joins them."""
