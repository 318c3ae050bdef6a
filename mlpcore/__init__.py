"""A training engine for multilayer perceptrons with the backward pass in matrix form.

import mlpcore as mc

net = mc.MLP([784, 128, 10], activations="relu", output="softmax")
trainer = mc.Trainer(net, loss="cross_entropy", optimizer=mc.AdamW(1e-3))
trainer.fit(X, Y, epochs=10, batch_size=256)
"""

from mlpcore._version import __version__
from mlpcore.backends.info import info
from mlpcore.checks.errors import DeviceUnavailable, NonFiniteLoss
from mlpcore.core.activations import Activation
from mlpcore.core.losses import Loss
from mlpcore.core.optimizers import SGD, Adam, AdamW, Layer, Lion, RMSprop
from mlpcore.core.schedules import (
    Adaptive,
    Constant,
    Cosine,
    FormulaSchedule,
    InverseScaling,
    StepDecay,
)
from mlpcore.data.parquet import Parquet
from mlpcore.gradcheck import GradientCheck, check_gradients
from mlpcore.mlp import MLP, Cache, Gradient, loss
from mlpcore.trainer import Trainer
from mlpcore.training.callbacks import Callback, EarlyStopping

__all__ = [
    "MLP",
    "SGD",
    "Activation",
    "Adam",
    "AdamW",
    "Adaptive",
    "Cache",
    "Callback",
    "Constant",
    "Cosine",
    "DeviceUnavailable",
    "EarlyStopping",
    "FormulaSchedule",
    "Gradient",
    "GradientCheck",
    "InverseScaling",
    "Layer",
    "Lion",
    "Loss",
    "NonFiniteLoss",
    "Parquet",
    "RMSprop",
    "StepDecay",
    "Trainer",
    "__version__",
    "check_gradients",
    "info",
    "loss",
]
