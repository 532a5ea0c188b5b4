"""Under the Trainer: stages 05, 12 and 13."""
