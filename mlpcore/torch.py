"""A network as a layer of a PyTorch model: `mlpcore.torch.Module(net)`.

    forward:  Z[L] of the rows of X          backward:  G = ∂J/∂Z[L]  →  ∂J/∂X, ∂J/∂parameters

Arrays are exchanged through DLPack, without a copy. The module's one parameter, `flat`, shares the
memory of `net.parameters`, so PyTorch's optimizers train the network in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mlpcore.engine import passes
from mlpcore.mlp import MLP

__all__ = ["Module"]


def _shared(tensor: torch.Tensor) -> bool:
    """Return True for a host tensor in memory shared between processes."""
    return bool(tensor.device.type == "cpu" and tensor.is_shared())


class _Rows(torch.autograd.Function):
    """The forward pass to Z[L] for rows (m, n_0), and the backward pass from autograd's G."""

    @staticmethod
    def forward(ctx: Any, X: torch.Tensor, flat: torch.Tensor, net: MLP) -> torch.Tensor:
        cache = net.forward(X.detach())
        output: torch.Tensor = torch.from_dlpack(cache.output)
        ctx.net, ctx.cache = net, cache
        ctx.save_for_backward(X, flat, output)
        return output

    @staticmethod
    def backward(ctx: Any, G: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, None]:
        if torch.is_grad_enabled():  # a second derivative would silently be 0
            raise RuntimeError(
                "mlpcore.torch.Module has first derivatives only, no create_graph=True; use "
                "net.jvp, net.vjp or net.hvp"
            )
        # these share the cache's memory: this raises if any was modified after the forward pass
        _ = ctx.saved_tensors
        gradient = ctx.net.backward(ctx.cache, G, input_gradient=ctx.needs_input_grad[0])
        by_X = torch.from_dlpack(gradient.X) if ctx.needs_input_grad[0] else None
        return by_X, torch.from_dlpack(gradient.flat), None


class Module(torch.nn.Module):
    """A network as a PyTorch module: `torch.nn.Sequential(linear, mlpcore.torch.Module(net))`.

    The input X is (…, n_0), on the network's device; the output is (…, n_L), in the network's
    dtype. Gradients flow to `flat` and to X, but only first derivatives: for others use `net.jvp`,
    `net.vjp` and `net.hvp`. `.to(device)`, `.double()` and `.share_memory()` replace `net` with a
    copy, as `net.to` does.

    Args:
        net: the network; trained in place.

    Attributes:
        net: the network.
        flat: `torch.nn.Parameter` of all W, all b and all a, in the memory of `net.parameters`.

    Raises:
        TypeError: `net` is not an `mc.MLP`.
    """

    def __init__(self, net: MLP) -> None:
        super().__init__()
        if not isinstance(net, MLP):
            raise TypeError(f"net must be an mc.MLP; got {type(net).__name__}")
        self.net = net
        self._memory = torch.from_dlpack(net.parameters)
        self.flat = torch.nn.Parameter(self._memory)

    def __setattr__(self, name: str, value: Any) -> None:
        """Let a parameter assigned to `flat` become the network's with the next call."""
        super().__setattr__(name, value)
        if name == "flat" and isinstance(value, torch.nn.Parameter):
            self._own = (value,)  # in a tuple, so that PyTorch does not register it twice

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        """Return Z[L] of the rows of X.

        Raises:
            TypeError, ValueError: X is not a tensor, is on another device, or its last axis is not
                n_0; or `flat` does not have the shape of `net.parameters`.
        """
        if torch.compiler.is_compiling():  # this layer runs uncompiled in a compiled model
            called: torch.Tensor = torch.compiler.disable(self._forward)(X)
            return called
        return self._forward(X)

    def _forward(self, X: torch.Tensor) -> torch.Tensor:
        if not isinstance(X, torch.Tensor):
            raise TypeError(f"X must be a torch.Tensor; got {type(X).__name__}")
        net = self._net()
        if X.device != self.flat.device:
            raise ValueError(f"X is on {X.device}, the module on {self.flat.device}")
        if X.ndim == 0 or X.shape[-1] != self.net.sizes[0]:
            raise ValueError(
                f"X has shape {tuple(X.shape)}; the last axis must be {self.net.sizes[0]}"
            )
        rows = X.reshape(-1, X.shape[-1])
        if not len(rows):  # both gradients are 0
            output = (
                rows.to(self.flat.dtype) @ self.flat.new_zeros(net.sizes[0], net.sizes[-1])
                + 0 * self.flat.sum()
            )
        elif torch.is_grad_enabled() and (rows.requires_grad or self.flat.requires_grad):
            output = _Rows.apply(rows, self.flat, net)
        else:
            output = passes.outputs(net, rows.detach())
        shaped: torch.Tensor = output.reshape(*X.shape[:-1], output.shape[-1])
        return shaped

    def _net(self) -> MLP:
        """Return the network with `flat` as its parameters.

        This is `net`, or a copy if torch.func replaced `flat` for one call. If the module's own
        parameter got new memory (`flat.data = …`, `vector_to_parameters`), its values are copied
        into the network's memory; memory shared between processes becomes the network's memory.
        """
        with torch.inference_mode(False):  # an inference tensor could not train
            given, memory = self.flat.detach(), torch.from_dlpack(self.net.parameters)
            if given.shape != memory.shape:
                raise ValueError(
                    f"flat has shape {tuple(given.shape)}; the network's parameters have "
                    f"{tuple(memory.shape)}"
                )
            if given.device != memory.device:
                raise ValueError(
                    f"flat is on {given.device}, the network on {memory.device}: use "
                    "DistributedDataParallel, not DataParallel"
                )
            if given.data_ptr() == memory.data_ptr():
                return self.net
            if self.flat is self._own[0]:
                if _shared(given) and given.dtype == memory.dtype:
                    self._adopt(self.net.copy(), given)
                    return self.net
                if self._memory.data_ptr() != memory.data_ptr():
                    self._memory = memory
                self.flat.data = self._memory  # a tensor whose is_shared() is right
                with torch.no_grad():
                    self.flat.copy_(given)  # bumps the version that backward checks
                return self.net
        twin = self.net.copy()
        torch.from_dlpack(twin.parameters).copy_(given)
        return twin

    def _adopt(self, net: MLP, memory: torch.Tensor | None = None) -> None:
        """Hold another network, with its parameters in `memory`, an equal tensor, if given."""
        if memory is not None:
            net._set(memory.numpy())
        self.net = net
        self._memory = torch.from_dlpack(net.parameters) if memory is None else memory
        self.flat.data = self._memory

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Module:
        """Move the network as well in `.to`, `.double`, `.share_memory` and similar methods."""
        moved = fn(self.flat.detach().new_empty(1))
        shares = _shared(moved) and not _shared(self.flat)
        if (moved.dtype, moved.device) == (self.flat.dtype, self.flat.device) and not shares:
            return self
        if self.flat is not self._own[0]:
            raise RuntimeError(
                "flat is computed from other tensors (parametrize, prune), which the network "
                "cannot follow to another dtype, device or memory: remove that first"
            )
        net = self._net()
        if shares:
            self._adopt(net.copy(), self.flat.detach().clone().share_memory_())
            if self.flat.grad is not None:
                self.flat.grad.share_memory_()
        else:
            gradient, self.flat.grad = self.flat.grad, None
            self._adopt(net.copy(str(moved.dtype).removeprefix("torch.")).to(str(moved.device)))
            self.flat.grad = None if gradient is None else fn(gradient)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_memory"}

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: dict[str, Any], *more: Any
    ) -> None:
        """Load by copying, even with `assign=True`, so that `flat` stays the network's memory."""
        super()._load_from_state_dict(
            state_dict, prefix, {**local_metadata, "assign_to_params_buffers": False}, *more
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy whose parameter is its own network's memory, or shared memory."""
        super().__setstate__(state)
        self._memory = torch.from_dlpack(self.net.parameters)
        self._net()

    def extra_repr(self) -> str:
        """Return the network's repr, for `print(model)`."""
        return repr(self.net)
