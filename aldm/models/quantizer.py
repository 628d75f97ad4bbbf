"""Quantisers of a latent behind one interface: a codebook, and finite scalars that need none.

`Codebook` is vector quantisation: chunked nearest code, straight-through gradient, EMA codebook, revival of dead codes.
van den Oord et al. 2017 (arXiv 1711.00937), eq. 3 for the commitment term and appendix A.1 for the moving averages
that stand for its codebook term. Differs in that the codebook starts from the first batch and that codes nobody uses
are replaced by live encoder outputs.

`FiniteScalars` rounds every channel to a fixed grid: Mentzer et al. 2024 (arXiv 2309.15505). Differs in that the grid
is symmetric about 0 for even numbers of levels too, and that the latent is bounded before anybody sees it, so that it
and its quantised values lie in one space.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aldm.models.blocks import without_autocast

CHUNK_BYTES = 64 * 2**20
"""Memory of the distances of one chunk of the code search."""
REVIVE_AFTER_STEPS = 32
"""A code unused for this many training steps moves to a live encoder output (and again after as many more)."""
USAGE_WINDOW_STEPS = 128
"""`codebook_usage` is the fraction of codes used in this many last training steps; a multiple of the line above."""


class Quantized(NamedTuple):
    """What quantisation returns.

    `commitment_loss` is a scalar, already multiplied by beta. `codebook_usage` in [0, 1] and `perplexity` in [1, K]
    describe the training so far; without a quantiser they are nan and `indices` is None.
    """

    z_q: Tensor
    commitment_loss: Tensor
    codebook_usage: Tensor
    perplexity: Tensor
    indices: Tensor | None


def nearest_code(z: Tensor, codebook: Tensor, chunk_rows: int | None = None) -> Tensor:
    """Return the index of the nearest code of each row, without the whole distance matrix.

    Args:
        z: (N, D) vectors.
        codebook: (K, D) codes.
        chunk_rows: rows of z searched at once; None takes as many as CHUNK_BYTES hold.

    Returns:
        (N,) int64; of codes at the same distance the first.
    """
    if chunk_rows is None:
        chunk_rows = max(1, CHUNK_BYTES // (4 * codebook.shape[0]))
    with without_autocast(z):
        z, codebook = z.detach().float(), codebook.detach().float()
        # |z - c|^2 = |z|^2 + |c|^2 - 2 z.c; |z|^2 changes no argmin. Centred, so that an offset costs no digits.
        centre = codebook.mean(dim=0)
        codes = codebook - centre
        squares = codes.square().sum(dim=1)
        chunks = [
            torch.addmm(squares, rows - centre, codes.t(), alpha=-2).argmin(dim=1) for rows in z.split(chunk_rows)
        ]
    return torch.cat(chunks)


class Quantizer(nn.Module, ABC):
    """A finite set of codes, and how often each is used; all of it lies in buffers.

    Args:
        codebook_size: number of codes, K.
        dim: length of a code, D.
        decay: decay of the moving averages.

    Attributes:
        reduce: sums a tensor over all ranks; the identity until a distributed engine sets it.
        rank: this process's number among those that `reduce` sums over.
    """

    step: Tensor
    idle_steps: Tensor
    ema_count: Tensor

    def __init__(self, codebook_size: int, dim: int, decay: float) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        self.dim = dim
        self.decay = decay
        self.reduce: Callable[[Tensor], Tensor] = _identity
        self.rank = 0
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("idle_steps", torch.full((codebook_size,), USAGE_WINDOW_STEPS, dtype=torch.int64))
        self.register_buffer("ema_count", torch.zeros(codebook_size))

    @abstractmethod
    def forward(self, z: Tensor) -> Quantized:
        """Quantise (B, D, X, Y, Z); in training mode the uses are counted. `z_q` and the loss are fp32."""

    @abstractmethod
    def lookup(self, z: Tensor) -> Tensor:
        """Return the codes of (B, D, X, Y, Z) and nothing else: no gradient, no learning."""

    @abstractmethod
    def bound(self, z: Tensor) -> Tensor:
        """Return what the encoder gives, (B, D, X, Y, Z), in the range of the codes: the latent."""

    @abstractmethod
    def search_bytes(self, rows: int) -> int:
        """Return the memory beyond input and result that finding the codes of so many vectors takes, bytes."""

    def usage(self) -> Tensor:
        """Return the fraction of codes used in the last USAGE_WINDOW_STEPS training steps."""
        return (self.idle_steps < USAGE_WINDOW_STEPS).float().mean()

    def perplexity(self) -> Tensor:
        """Return exp(entropy) of the moving average of how often each code is used: K when all are used alike."""
        share = self.ema_count / self.ema_count.sum().clamp_min(1e-12)
        return torch.exp(-torch.xlogy(share, share).sum())

    @torch.no_grad()
    def _count(self, counts: Tensor) -> Tensor:
        """Take in how often each code was used in a step, (K,) over all ranks; return the decay that this step takes.

        The first step's averages are its own counts. The caller moves `step` on.
        """
        old = torch.where(self.step == 0, 0.0, self.decay)
        self.ema_count.mul_(old).add_(counts * (1 - old))
        self.idle_steps.add_(1).masked_fill_(counts > 0, 0)
        return old


class Codebook(Quantizer):
    """Codes that are moving averages of the vectors that they stand for.

    The random choices derive from the step counter, so a resumed training takes the same codes.

    Args:
        codebook_size: number of codes, K.
        dim: length of a code, D.
        decay: decay of the moving averages.
        commitment_weight: beta, multiplies the commitment term.
    """

    codebook: Tensor
    ema_sum: Tensor

    def __init__(self, codebook_size: int, dim: int, decay: float = 0.99, commitment_weight: float = 0.25) -> None:
        super().__init__(codebook_size, dim, decay)
        self.commitment_weight = commitment_weight
        self.register_buffer("codebook", torch.randn(codebook_size, dim) / math.sqrt(dim))
        self.register_buffer("ema_sum", torch.zeros(codebook_size, dim))

    def forward(self, z: Tensor) -> Quantized:
        """Quantise (B, D, X, Y, Z); in training mode the codebook learns from z. `z_q` and the loss are fp32."""
        with without_autocast(z):
            z = z.float()
            rows = z.movedim(1, -1).reshape(-1, self.dim)
            if self.training and int(self.step) == 0:
                self._start_from(rows)
            indices = nearest_code(rows, self.codebook)
            selected = F.embedding(indices, self.codebook)
            commitment_loss = self.commitment_weight * F.mse_loss(rows, selected)
            z_q = selected.view(z.shape[0], *z.shape[2:], self.dim).movedim(-1, 1)
            z_q = z + (z_q - z).detach()  # straight-through
            if self.training:
                self._learn(rows.detach(), selected, indices)
        shape = (z.shape[0], *z.shape[2:])
        return Quantized(z_q, commitment_loss, self.usage(), self.perplexity(), indices.view(shape))

    def lookup(self, z: Tensor) -> Tensor:
        """Return the nearest codes of (B, D, X, Y, Z) and nothing else: no gradient, no learning."""
        rows = z.detach().float().movedim(1, -1)
        indices = nearest_code(rows.reshape(-1, self.dim), self.codebook)
        return F.embedding(indices, self.codebook).view(rows.shape).movedim(-1, 1)

    def bound(self, z: Tensor) -> Tensor:
        """Return z: codes may lie anywhere."""
        return z

    def search_bytes(self, rows: int) -> int:
        """Return the memory of a chunk of distances, bytes."""
        return min(CHUNK_BYTES, 4 * rows * self.codebook_size)

    @torch.no_grad()
    def _start_from(self, rows: Tensor) -> None:
        """Put the codes on vectors of the first batch."""
        self.codebook.copy_(self._candidates(rows.detach(), torch.ones_like(rows[:, 0])))

    @torch.no_grad()
    def _learn(self, rows: Tensor, selected: Tensor, indices: Tensor) -> None:
        """Update the moving averages and with them the codes, and revive dead codes."""
        statistics = rows.new_zeros(self.codebook_size, self.dim + 1)
        statistics.index_add_(0, indices, torch.cat((rows, torch.ones_like(rows[:, :1])), dim=1))
        statistics = self.reduce(statistics)
        sums, counts = statistics[:, :-1], statistics[:, -1]
        old = self._count(counts)
        self.ema_sum.mul_(old).add_(sums * (1 - old))
        used = (self.ema_count > 1e-6)[:, None]
        self.codebook.copy_(torch.where(used, self.ema_sum / self.ema_count.clamp_min(1e-6)[:, None], self.codebook))
        candidates = self._candidates(rows, (rows - selected).square().sum(dim=1))
        dead = (self.idle_steps > 0) & (self.idle_steps % REVIVE_AFTER_STEPS == 0)
        self.codebook.copy_(torch.where(dead[:, None], candidates, self.codebook))
        count = torch.where(dead, self.ema_count.mean().clamp_min(1e-3) * (1 - self.decay), self.ema_count)
        self.ema_sum.copy_(torch.where(dead[:, None], candidates * count[:, None], self.ema_sum))
        self.ema_count.copy_(count)
        self.step.add_(1)

    def _candidates(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Draw K of the rows, the same ones on every rank, with probability proportional to the weights.

        Weighted by their error, new codes go where the codebook is poor (k-means++ does the same), not onto the
        background that most of a volume is. Without replacement as far as there are rows (Efraimidis & Spirakis 2006).
        Code k is drawn by one rank in turn and reaches the others through the sum.
        """
        generator = torch.Generator().manual_seed(int(self.step))
        noise = torch.empty(rows.shape[0]).exponential_(generator=generator).to(rows.device)
        order = torch.topk(weights / noise, min(self.codebook_size, rows.shape[0])).indices
        repeats = -(-self.codebook_size // order.shape[0])
        drawn = rows[order.repeat(repeats)[: self.codebook_size]]
        if repeats > 1:  # fewer rows than codes: copies are set apart, or they would stay one code forever
            jitter = torch.randn(drawn.shape, generator=generator).to(drawn)
            drawn = drawn + 0.01 * rows.std(dim=0, unbiased=False) * jitter
        world_size = self.reduce(torch.ones(1, device=rows.device)).round().long()
        turn = torch.arange(self.codebook_size, device=rows.device) % world_size == self.rank
        return self.reduce(drawn * turn[:, None])


class FiniteScalars(Quantizer):
    """Channel d takes the nearest of levels[d] values, evenly spaced from -1 to 1; a code is a value for each channel.

    Nothing is learnt here, so no code can die and no term has to hold the encoder near its codes.

    Args:
        levels: values of each channel, 2 or more; D is their number, K their product.
        decay: decay of the moving average of the uses.
    """

    def __init__(self, levels: Sequence[int], decay: float = 0.99) -> None:
        super().__init__(math.prod(levels), len(levels), decay)
        self.levels = tuple(levels)

    def forward(self, z: Tensor) -> Quantized:
        """Quantise (B, D, X, Y, Z), straight through; in training mode the uses are counted. `z_q` is fp32."""
        with without_autocast(z):
            z = z.float()
            z_q = z + (self.lookup(z) - z).detach()  # straight-through
            indices = self._indices(z)
            if self.training:
                self._count(self.reduce(torch.bincount(indices.flatten(), minlength=self.codebook_size).float()))
                self.step.add_(1)
        return Quantized(z_q, torch.zeros((), device=z.device), self.usage(), self.perplexity(), indices)

    def lookup(self, z: Tensor) -> Tensor:
        """Return the nearest values of (B, D, X, Y, Z) and nothing else: no gradient, no counting."""
        return self._numbers(z) / self._half_steps(z) - 1

    def bound(self, z: Tensor) -> Tensor:
        """Return tanh of (B, D, X, Y, Z), in fp32."""
        return torch.tanh(z.float())

    def search_bytes(self, rows: int) -> int:
        """Return 0: nothing is searched."""
        return 0

    def _indices(self, z: Tensor) -> Tensor:
        """Number the code of each vector: its values' numbers are the digits, the first channel's the least."""
        radix = torch.tensor([math.prod(self.levels[:d]) for d in range(self.dim)], device=z.device)
        return (self._numbers(z).long() * radix.view(-1, 1, 1, 1)).sum(dim=1)

    def _numbers(self, z: Tensor) -> Tensor:
        """Number each value from 0, as whole floats; beyond -1 and 1, where samples may lie, the last is nearest."""
        return ((z.detach().float().clamp(-1, 1) + 1) * self._half_steps(z)).round()

    def _half_steps(self, z: Tensor) -> Tensor:
        """Return half the number of steps from -1 to 1, (D, 1, 1, 1)."""
        return torch.tensor([(level - 1) / 2 for level in self.levels], device=z.device).view(-1, 1, 1, 1)


def _identity(x: Tensor) -> Tensor:
    return x
