"""The mathematics: formulas, activations, losses, optimizers, parameters and the recurrences."""
