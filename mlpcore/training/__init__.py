"""Training: steps, the loop over epochs, callbacks, scores and checkpoints."""
