"""Columns of metrics.jsonl, whose names are also the tags of the TensorBoard events."""

# Measured at step 0, every eval_every steps and at the end; null where a number is not finite.
ALWAYS = {
    "step": "Learner updates so far.",
    "wall_seconds": "Seconds since the start of the run, compilation included; a resumed run continues the count.",
    "step_seconds": "Seconds spent on steps and rounds, compilation included, measurements and checkpoints not.",
    "learner_examples": "Examples in the minibatches so far, of all learner devices.",
    "worker_examples": "Examples scored by workers so far.",
    "failed_rounds": "Scoring rounds lost to an error of their device.",
    "skipped_updates": "Updates skipped because a loss or gradient was not finite (on_nonfinite = skip).",
    "train/loss": "Mean loss of the training split, in nats.",
    "train/error": "Share of the training split that is misclassified.",
    "test/loss": "Mean loss of the test split, in nats.",
    "test/error": "Share of the test split that is misclassified.",
    "variance/uniform": "√Tr Σ of one example's gradient under uniform draws.",
    "variance/actual": "√Tr Σ of one example's importance-weighted gradient under the draws of the run; no limit.",
    "variance/ideal": "√Tr Σ under draws in proportion to the exact gradient norms, the least possible.",
    "variance/window": "As variance/actual, of ten successive minibatches, which shuffled epochs and strides balance.",
    "variance/gain": "Variance under uniform draws over that of the run: above 1, importance sampling lowers it.",
    "variance/equivalent_batch": "Size of a uniform minibatch whose gradient has the variance of the run's.",
    "memory/resident_bytes": "Memory of the process on the host, in bytes.",
}
WITH_IMPORTANCE_SAMPLING = {
    "scores/staleness_mean": "Mean age of the scores in learner steps, over examples with a score.",
    "scores/staleness_max": "Age of the oldest score, in learner steps.",
    "scores/scored_fraction": "Share of the examples that have a score.",
    "scores/effective_sample_size": "Kish's effective size of a minibatch; the minibatch size for uniform draws.",
    "scores/histogram": "List: how many scores lie below 2^-24, in each octave up to 2^8, and above.",
    "scores/staleness_histogram": "List: how many scores are 0, 1, 2 to 3, 4 to 7, ... and at least 2^20 steps old.",
    "scores/rejected": "Scores discarded so far because they were NaN, infinite or negative.",
}
WITH_IMAGES = {
    "scores/hardest": "List of the examples with the largest scores, by their indices, largest first.",
}
WITH_AUTO = {
    "payoff/active": "1 while examples are drawn by importance, 0 while uniformly.",
    "payoff/gain": "Variance of a uniform minibatch over that of the proposal, as last measured.",
    "payoff/cost": "Time of a step with importance sampling, in uniform steps.",
}
ON_ACCELERATORS = {
    "memory/learner_bytes": "Memory in use on the learner device, in bytes.",
}
OF_OWN_PROBLEMS = {
    "train/NAME, test/NAME": "Mean of each metric of the problem; without test examples there is no column of tests.",
}
COLUMNS = {
    "": ALWAYS,
    "With importance sampling": WITH_IMPORTANCE_SAMPLING,
    "With log.tensorboard_images": WITH_IMAGES,
    "With proposal.when = auto": WITH_AUTO,
    "With a problem of your own, in place of train/error and test/error": OF_OWN_PROBLEMS,
    "Where the device reports its memory": ON_ACCELERATORS,
}
