"""Many hyperparameters, of one training run or of one network over many tables."""
