"""Scores of the training examples, and the workers that compute them."""
