"""Train, export to ONNX, predict in onnxruntime: the same numbers, from the original columns.

The net is trained on standardised columns and a standardised target. Both maps go into the file, so
that using it needs neither mlpcore nor the means:

    Z = net((X - mean) / scale) · target_scale + target_mean
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
from sklearn.datasets import load_diabetes

import mlpcore as mc
from mlpcore.tables.standardizer import Standardizer


def trained(epochs, seed=0):
    """Return a net for the progression of diabetes, the maps around it, and the held-out rows."""
    X, y = load_diabetes(return_X_y=True, scaled=False)
    X, y = X.astype(np.float32), y[:, None].astype(np.float32)
    order = np.random.default_rng(seed).permutation(len(X))
    X, y = X[order], y[order]
    columns, target = Standardizer.fit(X[:350]), Standardizer.fit(y[:350])
    net = mc.MLP([10, 32, 1], "gelu", seed=seed)
    trainer = mc.Trainer(
        net, "squared_error", mc.AdamW(mc.Cosine(3e-3), weight_decay=0.1), seed=seed
    )
    trainer.fit(
        columns.apply(X[:350]), target.apply(y[:350]), epochs=epochs, batch_size=25, progress=False
    )
    return net, columns, target, X[350:], y[350:]


def compared(net, columns, target, X, folder):
    """Return the predictions for unscaled rows by mlpcore and by onnxruntime."""
    path = Path(folder) / "diabetes.onnx"
    net.to_onnx(
        path,
        mean=columns.mean,
        scale=columns.scale,
        target_mean=target.mean,
        target_scale=target.scale,
    )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    ours = net.predict(columns.apply(X)) * target.scale + target.mean
    return ours, session.run(["Z"], {"X": X})[0], path.stat().st_size


def main():
    """Print predictions side by side, and their largest difference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="unused: this example draws no picture")
    parser.add_argument("--quick", action="store_true", help="5 epochs")
    net, columns, target, X, y = trained(5 if parser.parse_args().quick else 60)
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs, size = compared(net, columns, target, X, folder)
    print(f"{net!r}\nas an ONNX file: {size:,} bytes\n\nprogression   mlpcore    onnxruntime")
    for truth, a, b in list(zip(y[:, 0], ours[:, 0], theirs[:, 0], strict=True))[:6]:
        print(f"{truth:11.0f}   {a:7.3f}   {b:12.3f}")
    apart = np.abs(ours - theirs).max() / np.abs(ours).max()
    print(f"\n{len(X)} rows, largest difference over largest prediction: {apart:.0e}")
    print(f"equal up to rounding: {bool(apart < 1e-5)}")


if __name__ == "__main__":
    main()
