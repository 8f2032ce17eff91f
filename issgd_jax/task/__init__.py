"""What is learned: data, models, losses, and the problem that joins them."""
