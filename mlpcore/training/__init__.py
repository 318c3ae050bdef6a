"""The loop over epochs and what accompanies it: callbacks, scores, checkpoints."""
