"""Spectral adapters: the singular values of the encoder's frozen matrices are what is trained.

With W = U S V^T, of rank n, singular values in falling order:

    S-SAM (Paranjape et al. 2024): W' = U diag(max(a S + b, 0)) V^T
    SALT (Elsayed et al. 2025):    W' = U M V^T, M = diag(max(a S_k + b, 0)) on the top k values, diag(S_r) + X Y on the n - k others

so that S-SAM is SALT with k = n. SALT's own code differs in three things: it clips all of M at 0, the entries of X Y too, draws Y at random as
it does X, so that training does not begin with the base, and adds the size of the change to the loss. Both are W' = W + B A with few rows of A:

    A = [V_k^T; Y V_r^T], (k + r) x in     B = [U_k diag(d), U_r X], out x (k + r)     d = max(a S_k + b, 0) - S_k

A layer therefore costs one dense product, and SALT's gradients some of low rank. Singular vectors have no sign of their own,
and X and Y mean nothing with others: they are computed in one way (`decompose`), and a file knows which they were (`check_bases`).
"""

from __future__ import annotations

from pathlib import Path

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import CheckpointError
from .medsam import linear_places
from .sections import Adapter
from .threads import one_thread

_PROBES = 4  # numbers that tell a basis from another
_SAME = 1e-3  # how far they may differ; a vector of the other sign makes a difference of about 1


def decompose(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (out x n), S (n, falling) and V^T (n x in) of an out x in matrix, n the lesser of both: in float64 on the CPU, by one
    thread, the largest entry of each left vector positive. The same matrix has the same factors, wherever it lies; one on the
    meta device gets their sizes."""
    if matrix.is_meta:
        return torch.linalg.svd(matrix, full_matrices=False)
    with one_thread():
        u, s, vt = torch.linalg.svd(matrix.detach().double().cpu(), full_matrices=False)
    sign = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
    return u * sign, s, vt * sign.T


class Spectral(nn.Module):
    """A linear layer or convolution (its matrix: out x in h w) under SALT with the `top` singular values and `rank` columns of X, or as
    many as it has; all of them are top in S-SAM. The same function as `layer` until it is trained: X is drawn from the global generator.

    `scale` holds a - 1, so that weight decay pulls towards the base. W' is built once for each change of the parameters, known from
    the versions that torch counts: change them through optimisers (fused ones do not count), `copy_` or `load_state_dict`, not through `.data`.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, top: int, rank: int):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias  # the weight in full precision: bf16 would round small changes of it away, all of them
        self.convolution = dict(stride=layer.stride, padding=layer.padding) if isinstance(layer, nn.Conv2d) else None
        u, s, vt = decompose(self.weight.flatten(1))
        top = min(top, len(s))
        rest = len(s) - top
        rank = min(rank, rest)
        new = {"device": self.weight.device, "dtype": self.weight.dtype}
        self.scale, self.shift = nn.Parameter(torch.zeros(top, **new)), nn.Parameter(torch.zeros(top, **new))
        self.x = nn.Parameter(torch.randn(rest, rank, **new) * rest**-0.5) if rank else None
        self.y = nn.Parameter(torch.zeros(rank, rest, **new)) if rank else None
        for name, value in (("u", u), ("s", s), ("vt", vt)):
            self.register_buffer(name, value.to(**new), persistent=False)
        self.register_buffer("basis", fingerprint(u).to(**new))
        self._built: tuple = (None, None)

    def parts(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """d (k), and U_r X (out x r) and Y V_r^T (r x in) where there is a rest."""
        top = len(self.scale)
        s = self.s[:top]
        diagonal = (s + s * self.scale + self.shift).clamp(min=0) - s
        return (diagonal, None, None) if self.x is None else (diagonal, self.u[:, top:] @ self.x, self.y @ self.vt[top:])

    def factors(self) -> tuple[Tensor, Tensor]:
        """B (out x m) and A (m x in) of W' = W + B A, m = k + r at most n."""
        diagonal, left, right = self.parts()
        top = len(diagonal)
        first = self.u[:, :top] * diagonal, self.vt[:top]
        return first if left is None else (torch.cat([first[0], left], 1), torch.cat([first[1], right]))

    def changed(self, dtype: torch.dtype) -> Tensor:
        """W', of the weight's shape and type; B A is computed in `dtype`."""
        left, right = (factor.to(dtype) for factor in self.factors())
        return self.weight + (left @ right).view_as(self.weight)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """W' in `dtype` and without a gradient, which is kept until a parameter changes."""
        key = (dtype, *((id(parameter), parameter._version) for parameter in self.parameters()))
        if self._built[0] != key:
            with torch.inference_mode(False), torch.no_grad():  # validation builds one that training may take up
                self._built = key, self.changed(dtype).to(dtype)
        return self._built[1]

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        x = x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
        bias = None if self.bias is None else self.bias.to(x.dtype)
        with torch.autocast(device, enabled=False):
            if self.convolution:
                return F.conv2d(x, self.changed(x.dtype).to(x.dtype), bias, **self.convolution)
            if not torch.is_grad_enabled():
                return F.linear(x, self.dense(x.dtype), bias)
            flat = x.reshape(-1, x.shape[-1])
            return _Product.apply(flat, *self.parts(), self.dense(x.dtype), bias, self).view(*x.shape[:-1], -1)

    def merged(self) -> nn.Linear | nn.Conv2d:
        """The plain layer of W', frozen."""
        out, into, *kernel = self.weight.shape
        with torch.device("meta"):
            layer = nn.Conv2d(into, out, kernel, **self.convolution) if self.convolution else nn.Linear(into, out)
        layer.weight, layer.bias = nn.Parameter(self.changed(self.weight.dtype).detach(), requires_grad=False), self.bias
        return layer.train(self.training)

    def _apply(self, fn, recurse=True):
        self._built = None, None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_built": (None, None)}  # a copy counts its own versions


class _Product(torch.autograd.Function):
    """x (tokens x in) times W' transposed, as it was built, and the bias. The parts of B A get their gradients without that of W', which
    costs as much as the product, wherever this is cheaper: multi_dot chooses the order."""

    @staticmethod
    def forward(ctx, x: Tensor, diagonal: Tensor, left: Tensor | None, right: Tensor | None, weight: Tensor, bias: Tensor | None, layer: Spectral) -> Tensor:
        ctx.save_for_backward(x, diagonal, left, right)
        ctx.weight, ctx.layer = weight, layer
        return F.linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, diagonal, left, right = ctx.saved_tensors
        (out, into), top, dtype = ctx.weight.shape, len(diagonal), gradient.dtype
        u, vt = ctx.layer.u[:, :top], ctx.layer.vt[:top].to(dtype)
        gradient_left = gradient_right = None
        if top == into and out > 2 * into:  # W' = U diag(S + d) V^T, and both gradients begin with that of its middle
            middle = gradient @ u.to(dtype)
            gradient_x = (middle * (ctx.layer.s + diagonal).to(dtype)) @ vt
            gradient_diagonal = (middle * (x @ vt.T)).sum(0, dtype=diagonal.dtype)
        else:
            gradient_x = gradient @ ctx.weight if ctx.needs_input_grad[0] else None
            gradient_diagonal = (torch.linalg.multi_dot([gradient.T, x, vt.T]) * u).sum(0)
        if left is not None:
            gradient_left = torch.linalg.multi_dot([gradient.T, x, right.to(dtype).T])
            gradient_right = torch.linalg.multi_dot([left.to(dtype).T, gradient.T, x])
        return gradient_x, gradient_diagonal, gradient_left, gradient_right, None, None, None


def attach(encoder: nn.Module, adapter: Adapter) -> None:
    """Put SALT or S-SAM on qkv, proj, lin1 and lin2 of every block of `encoder`, and with `adapter.neck` on the neck's convolutions."""
    ranks = {"attn": adapter.rank_attention, "mlp": adapter.rank_mlp}
    places = [(parent, name, ranks[part]) for part, parent, name in linear_places(encoder) if ranks[part]]
    if adapter.neck:
        places += [(encoder.neck, "0", adapter.rank_attention), (encoder.neck, "2", adapter.rank_attention)]
    for parent, name, rank in places:
        layer = getattr(parent, name)
        top = adapter.top if adapter.method == "salt" else min(layer.weight.flatten(1).shape)
        setattr(parent, name, Spectral(layer, top, rank))


def merge(encoder: nn.Module) -> None:
    """Replace every `Spectral` layer by the plain one of the same function."""
    for module in list(encoder.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, Spectral):
                setattr(module, name, layer.merged())


def check_bases(encoder: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """CheckpointError unless `state` (names as in `encoder`) was trained in the singular vectors that these layers have."""
    for name, layer in encoder.named_modules():
        if isinstance(layer, Spectral) and not torch.allclose(state[f"{name}.basis"].to(layer.basis), layer.basis, rtol=0, atol=_SAME):
            raise CheckpointError(f"{source} was trained in other singular vectors of {name} than this machine finds (their fingerprint is "
                                  f"{_numbers(state[f'{name}.basis'])}, here {_numbers(layer.basis)}): what it changed cannot be told. Export it "
                                  "as LoRA (spectral.to_lora) where it was trained")


def to_lora(encoder: nn.Module) -> tuple[peft.LoraConfig, dict[str, Tensor]]:
    """The LoRA of rank k + r at most that computes what the SALT or S-SAM layers of `encoder` do: its config, and the state that
    `peft.set_peft_model_state_dict` takes, for the base without adapter."""
    ranks, state = {}, {}
    for name, layer in encoder.named_modules():
        if isinstance(layer, Spectral):
            left, right = (factor.detach() for factor in layer.factors())
            kernel = layer.weight.shape[2:]
            ranks[name] = len(right)
            state[f"base_model.model.{name}.lora_A.weight"] = right.reshape(len(right), -1, *kernel).contiguous()
            state[f"base_model.model.{name}.lora_B.weight"] = left.reshape(len(left), -1, *(1 for _ in kernel)).contiguous()
    return peft.LoraConfig(target_modules=list(ranks), rank_pattern=ranks, alpha_pattern=ranks), state


def fingerprint(u: Tensor) -> Tensor:
    """Sums over the entries of `u` (out x n) with signs and weights of no regularity, which another sign or order of a vector changes."""
    probe = torch.arange(1, _PROBES + 1, dtype=u.dtype, device=u.device)[:, None]
    rows, columns = (torch.cos(probe * torch.arange(n, dtype=u.dtype, device=u.device)) for n in u.shape)
    return ((rows @ u) * columns).sum(1)


def _numbers(values: Tensor) -> str:
    return ", ".join(f"{value:.3f}" for value in values.tolist())
