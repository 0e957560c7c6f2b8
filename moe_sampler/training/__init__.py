"""Training on Accelerate: settings, random draws, the trainer, checkpoints."""
