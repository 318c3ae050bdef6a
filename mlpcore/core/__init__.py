"""The mathematics: formulas, activations, losses, optimizers, the layout of parameters, the
recurrences.
"""
