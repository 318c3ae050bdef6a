"""The mathematics: formulas, activations, losses, optimizers, parameters, the recurrences."""
