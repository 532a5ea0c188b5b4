"""What is trained: the model, its attention, losses and optimizers."""
