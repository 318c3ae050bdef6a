"""The engine as a layer in a PyTorch model, trained on digits by PyTorch's optimizer.

    model = Sequential(Linear(64, 48), Tanh(), mlpcore.torch.Module(net))

The module's one parameter is the memory of `net.parameters`, so the optimizer trains the network in
place. Its gradient comes from the recurrences; autograd does the rest. For comparison, the same
model is made of PyTorch's layers alone, with the same initial weights.
"""

import argparse
import copy

import numpy as np
import torch
from sklearn.datasets import load_digits

import mlpcore as mc
from mlpcore.torch import Module


def models(seed=0):
    """Return the model with our network, an equal one of PyTorch's layers, and the network."""
    torch.manual_seed(seed)
    net = mc.MLP([48, 64, 10], "relu", seed=seed)
    first = torch.nn.Linear(64, 48)
    theirs = torch.nn.Sequential(copy.deepcopy(first), torch.nn.Tanh(), *net.to_torch())
    return torch.nn.Sequential(first, torch.nn.Tanh(), Module(net)), theirs, net


def digits(seed=0):
    """Return training and test rows: X in 0 … 1 and classes, as tensors."""
    X, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(X))
    X, y = torch.from_numpy(X[order] / 16).float(), torch.from_numpy(y[order])
    return (X[:1400], y[:1400]), (X[1400:], y[1400:])


def train(model, X, y, epochs, batch=50, seed=0):
    """Return the mean loss of each epoch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(seed)
    history = []
    for _ in range(epochs):
        losses = []
        for rows in torch.randperm(len(X), generator=generator).split(batch):
            optimizer.zero_grad()
            J = torch.nn.functional.cross_entropy(model(X[rows]), y[rows])
            J.backward()
            optimizer.step()
            losses.append(J.item())
        history.append(float(np.mean(losses)))
    return history


@torch.no_grad()
def accuracy(model, X, y):
    """Return the share of rows whose largest output is their class."""
    return float((model(X).argmax(dim=1) == y).double().mean())


def main():
    """Print both models' losses and accuracies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="unused: this example draws no picture")
    parser.add_argument("--quick", action="store_true", help="3 epochs")
    options = parser.parse_args()
    torch.set_num_threads(1)  # nets as small as this one are slower with more
    training, test = digits()
    ours, theirs, net = models()
    print(ours)
    epochs = 3 if options.quick else 15
    histories = [train(model, *training, epochs) for model in (ours, theirs)]
    print("\nepoch   with mlpcore inside   PyTorch's layers")
    for epoch, (a, b) in enumerate(zip(*histories, strict=True), 1):
        print(f"{epoch:5}   {a:19.6f}   {b:16.6f}")
    print(
        f"\naccuracy on {len(test[0])} other rows: {accuracy(ours, *test):.1%} and "
        f"{accuracy(theirs, *test):.1%}"
    )
    shared = ours[2].flat.data_ptr() == net.parameters.ctypes.data
    print(f"the network was trained in place, in shared memory: {shared}")


if __name__ == "__main__":
    main()
