"""One learner: the training step, asynchronous learners, the optimiser, and measurements of loss and variance."""
