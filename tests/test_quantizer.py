"""The codebook against the naive search and the written-out moving averages, finite scalars against closed forms."""

import copy
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from aldm.models.quantizer import (
    CHUNK_BYTES,
    REVIVE_AFTER_STEPS,
    USAGE_WINDOW_STEPS,
    Codebook,
    FiniteScalars,
    Quantizer,
    nearest_code,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def dyadic(*shape: int) -> Tensor:
    """Random eighths: their distances are exact in fp32, so ties are ties for every way of computing them."""
    return torch.randint(-32, 32, shape) / 8


def naive_search(z: Tensor, codebook: Tensor) -> Tensor:
    return (z[:, None] - codebook[None]).square().sum(dim=-1).argmin(dim=1)


@pytest.mark.parametrize("chunk_rows", [1, 7, 100, 1000, None])
def test_chunked_search_is_the_naive_argmin(chunk_rows: int | None) -> None:
    z, codebook = dyadic(300, 3), dyadic(64, 3)
    assert torch.equal(nearest_code(z, codebook, chunk_rows), naive_search(z, codebook))


def test_an_offset_of_all_vectors_changes_no_code() -> None:
    z, codebook = dyadic(500, 3), dyadic(64, 3)
    assert torch.equal(nearest_code(z + 100.0, codebook + 100.0), naive_search(z + 100.0, codebook + 100.0))


def test_the_search_is_fp32_under_autocast() -> None:
    z, codebook = dyadic(500, 4), dyadic(64, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found = nearest_code(z, codebook)
    assert torch.equal(found, naive_search(z, codebook))


def test_a_perfect_match_has_no_loss() -> None:
    quantizer = Codebook(8, 2).eval()
    z = quantizer.codebook[torch.tensor([3, 0, 5, 5, 1, 7, 2, 6])].t().reshape(1, 2, 2, 2, 2)
    out = quantizer(z)
    assert out.commitment_loss == 0
    assert out.indices is not None
    assert out.indices.flatten().tolist() == [3, 0, 5, 5, 1, 7, 2, 6]
    torch.testing.assert_close(out.z_q, z)


def test_gradients_go_straight_through_and_the_commitment_is_that_of_the_paper() -> None:
    quantizer = Codebook(16, 3, commitment_weight=0.25).eval()
    z = torch.randn(2, 3, 2, 2, 2, requires_grad=True)
    out = quantizer(z)
    (gradient,) = torch.autograd.grad(out.z_q.sum(), z, retain_graph=True)
    torch.testing.assert_close(gradient, torch.ones_like(z))
    distance = (z - quantizer.lookup(z)).square().mean()
    torch.testing.assert_close(out.commitment_loss, 0.25 * distance)
    (gradient,) = torch.autograd.grad(out.commitment_loss, z)
    torch.testing.assert_close(gradient, 0.25 * 2 * (z - quantizer.lookup(z)).detach() / z.numel())


@pytest.mark.parametrize("make", [lambda: Codebook(16, 2), lambda: FiniteScalars((5, 4))])
def test_what_comes_out_is_the_code_and_training_counts_its_steps(make: Callable[[], Quantizer]) -> None:
    quantizer = make().train()
    z = torch.randn(2, 2, 3, 3, 3)
    for step in range(1, 4):
        quantizer(z)
        assert int(quantizer.step) == step
    quantizer.eval()
    torch.testing.assert_close(quantizer(z).z_q, quantizer.lookup(z))
    assert int(quantizer.step) == 3


def test_the_memory_of_a_search_is_that_of_a_chunk_of_distances() -> None:
    assert Codebook(16, 2).search_bytes(10) == 4 * 10 * 16
    assert Codebook(16, 2).search_bytes(10**9) == CHUNK_BYTES
    assert FiniteScalars((5, 4)).search_bytes(10**9) == 0


def test_rows_are_drawn_with_a_probability_proportional_to_their_weights() -> None:
    """One row has as much weight as fifty others together: it is the first that is drawn in half of the steps."""
    quantizer, rows = Codebook(1, 1), torch.arange(51.0)[:, None]
    weights = torch.tensor([50.0] + [1.0] * 50)
    first = 0
    for step in range(1000):
        quantizer.step.fill_(step)
        first += int(quantizer._candidates(rows, weights)) == 0
    assert 430 <= first <= 570


def test_the_codebook_starts_on_vectors_of_the_first_batch() -> None:
    quantizer = Codebook(8, 2)
    z = 5.0 + torch.randn(1, 2, 4, 4, 4)
    quantizer._start_from(z.movedim(1, -1).reshape(-1, 2))
    vectors = {tuple(row) for row in z.flatten(2)[0].t().tolist()}
    assert all(tuple(code) in vectors for code in quantizer.codebook.tolist())
    assert torch.unique(quantizer.codebook, dim=0).shape[0] == 8


def test_more_codes_than_vectors_start_apart() -> None:
    quantizer = Codebook(64, 2).train()
    quantizer(torch.randn(1, 2, 2, 2, 2))
    assert torch.unique(quantizer.codebook, dim=0).shape[0] == 64


def test_copies_of_too_few_vectors_spread_by_a_hundredth_of_their_deviation() -> None:
    quantizer = Codebook(4000, 1)
    quantizer._start_from(torch.tensor([[-1.0], [1.0]]))  # mean 0, deviation 1
    spread = quantizer.codebook - quantizer.codebook.sign()
    assert float(spread.mean()) == pytest.approx(0, abs=1e-3)
    assert float(spread.std()) == pytest.approx(0.01, rel=0.05)
    assert quantizer.codebook.sign().sum() == 0


def test_moving_averages_are_those_of_the_definition() -> None:
    quantizer = Codebook(4, 2, decay=0.9).train()
    batches = [torch.randn(1, 2, 3, 3, 3) for _ in range(3)]
    counts, sums, codebook = torch.zeros(4), torch.zeros(4, 2), None
    for step, z in enumerate(batches):
        rows = z.movedim(1, -1).reshape(-1, 2)
        if codebook is None:
            probe = copy.deepcopy(quantizer)
            probe._start_from(rows)
            codebook = probe.codebook.clone()
        one_hot = torch.nn.functional.one_hot(naive_search(rows, codebook), 4).float()
        old = 0.9 if step else 0.0
        counts = old * counts + (1 - old) * one_hot.sum(dim=0)
        sums = old * sums + (1 - old) * one_hot.t() @ rows
        quantizer(z)
        codebook = sums / counts[:, None]
        torch.testing.assert_close(quantizer.codebook, codebook)


def test_the_codebook_learns_from_the_first_step() -> None:
    quantizer = Codebook(8, 3).train()
    z = torch.randn(1, 3, 4, 4, 4)
    start = copy.deepcopy(quantizer)
    start._start_from(z.movedim(1, -1).reshape(-1, 3))
    quantizer(z)
    assert not torch.allclose(quantizer.codebook, start.codebook)


def test_evaluation_learns_nothing() -> None:
    quantizer = Codebook(8, 3).eval()
    before = copy.deepcopy(quantizer.state_dict())
    quantizer(torch.randn(1, 3, 4, 4, 4))
    quantizer.lookup(torch.randn(1, 3, 4, 4, 4))
    assert all(torch.equal(value, before[key]) for key, value in quantizer.state_dict().items())


def test_dead_codes_move_to_encoder_outputs_and_count_as_used_when_they_are() -> None:
    quantizer = Codebook(32, 2).train()
    z = torch.randn(1, 2, 8, 8, 8)
    quantizer(z)
    quantizer.codebook[16:] = 1000.0
    quantizer.ema_sum[16:] = 1000.0 * quantizer.ema_count[16:, None]
    quantizer.idle_steps.fill_(1000)
    quantizer(z)
    assert quantizer.usage() <= 0.5
    for _ in range(2 * REVIVE_AFTER_STEPS):
        quantizer(z)
    assert quantizer.codebook.abs().max() < z.abs().max() + 1e-6
    assert quantizer.usage() == 1.0


def test_dead_codes_go_where_the_error_is() -> None:
    """1000 vectors lie on a code and 8 far from all: codes that nobody uses move to those 8, to each at most once."""
    quantizer = Codebook(8, 1).train()
    quantizer.codebook.copy_(torch.arange(8.0)[:, None])
    quantizer.step.fill_(1)
    quantizer.idle_steps.fill_(REVIVE_AFTER_STEPS - 1)
    far = torch.arange(50.0, 58.0)
    quantizer(torch.cat((torch.zeros(1000), far)).view(1, 1, -1, 1, 1))
    moved = quantizer.codebook[1:7, 0]  # codes 0 and 7 are in use
    assert len(set(moved.tolist())) == 6
    assert set(moved.tolist()) <= set(far.tolist())
    torch.testing.assert_close(quantizer.codebook[[0, 7], 0], torch.tensor([0.0, float(far.mean())]))


def test_a_code_met_once_is_used() -> None:
    quantizer = Codebook(8, 1).train()
    assert quantizer.usage() == 0
    out = quantizer(torch.arange(8.0).view(1, 1, 2, 2, 2))
    assert out.codebook_usage == 1
    quantizer(torch.zeros(1, 1, 2, 2, 2))
    assert quantizer.idle_steps.sort().values.tolist() == [0, 1, 1, 1, 1, 1, 1, 1]


def test_perplexity_counts_the_codes_that_are_used_alike() -> None:
    quantizer = Codebook(8, 1)
    quantizer.ema_count.copy_(torch.tensor([3.0, 3.0, 3.0, 3.0, 0.0, 0.0, 0.0, 0.0]))
    torch.testing.assert_close(quantizer.perplexity(), torch.tensor(4.0))


def test_a_resumed_codebook_goes_on_bit_for_bit() -> None:
    batches = [torch.randn(1, 3, 4, 4, 4) for _ in range(REVIVE_AFTER_STEPS + 8)]
    straight = Codebook(64, 3).train()
    for z in batches:
        straight(z)
    stopped = Codebook(64, 3).train()
    for z in batches[:5]:
        stopped(z)
    resumed = Codebook(64, 3).train()
    resumed.load_state_dict(stopped.state_dict())
    torch.randn(17)  # the global generator is somewhere else
    for z in batches[5:]:
        resumed(z)
    for key, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_two_ranks_agree_and_match_one_rank_with_the_whole_batch() -> None:
    halves = torch.randn(2, 1, 2, 4, 4, 4)
    whole = Codebook(4, 2).train()
    ranks = [copy.deepcopy(whole) for _ in range(2)]
    start = torch.randn(4, 2)
    for quantizer in (whole, *ranks):
        quantizer.codebook.copy_(start)
        quantizer.step.fill_(1)
        quantizer.ema_count.fill_(1.0)
        quantizer.ema_sum.copy_(start)
    for _ in range(3):
        run_ranks(ranks, list(halves))
        whole(torch.cat(list(halves)))
    for key in ("codebook", "ema_count", "ema_sum", "idle_steps"):
        assert torch.equal(ranks[0].state_dict()[key], ranks[1].state_dict()[key])
        torch.testing.assert_close(ranks[0].state_dict()[key], whole.state_dict()[key])


def test_two_ranks_start_from_the_same_vectors_of_both() -> None:
    ranks = [Codebook(8, 2).train() for _ in range(2)]
    batches = [torch.rand(1, 2, 4, 4, 4), 10 + torch.rand(1, 2, 4, 4, 4)]
    run_ranks(ranks, batches)
    assert torch.equal(ranks[0].codebook, ranks[1].codebook)
    assert (ranks[0].codebook[:, 0] > 5).sum() == 4


LEVELS = [(2,), (3, 4), (8, 8, 8), (5, 2, 7)]


def all_codes(levels: tuple[int, ...]) -> Tensor:
    """Every code once, as a latent (1, D, K, 1, 1); the first channel's values change fastest."""
    grids = torch.meshgrid(*[torch.linspace(-1, 1, level) for level in reversed(levels)], indexing="ij")
    return torch.stack([grid.flatten() for grid in reversed(grids)])[None, :, :, None, None]


@pytest.mark.parametrize("levels", LEVELS)
def test_finite_scalars_have_as_many_codes_as_the_product_of_their_levels(levels: tuple[int, ...]) -> None:
    quantizer = FiniteScalars(levels).train()
    codes = all_codes(levels)
    out = quantizer(codes)
    assert quantizer.codebook_size == codes.shape[2] == math.prod(levels)
    assert out.indices.flatten().tolist() == list(range(quantizer.codebook_size))
    torch.testing.assert_close(out.z_q, codes)
    assert out.codebook_usage == 1
    torch.testing.assert_close(out.perplexity, torch.tensor(float(quantizer.codebook_size)))
    assert out.commitment_loss == 0


@pytest.mark.parametrize("levels", LEVELS)
def test_finite_scalars_are_the_nearest_codes(levels: tuple[int, ...]) -> None:
    """Values beyond -1 and 1, such as a sampler's, take the outermost code. Quantised values stay as they are."""
    quantizer = FiniteScalars(levels).eval()
    z = 3 * torch.rand(2, len(levels), 5, 4, 3) - 1.5
    codes = all_codes(levels)[0, :, :, 0, 0].t()
    nearest = naive_search(z.movedim(1, -1).reshape(-1, len(levels)), codes)
    out = quantizer(z)
    assert torch.equal(out.indices.flatten(), nearest)
    z_q = codes[nearest].view(2, 5, 4, 3, -1).movedim(-1, 1)
    torch.testing.assert_close(out.z_q, z_q)
    torch.testing.assert_close(quantizer.lookup(z), z_q)
    assert torch.equal(quantizer.lookup(quantizer.lookup(z)), quantizer.lookup(z))
    torch.testing.assert_close(quantizer.lookup(-z), -quantizer.lookup(z))  # even numbers of levels too


def test_the_gradient_of_finite_scalars_is_that_of_their_bound() -> None:
    quantizer = FiniteScalars((4, 5)).eval()
    x = torch.randn(1, 2, 3, 3, 3, requires_grad=True)
    weights = torch.randn(1, 2, 3, 3, 3)
    (gradient,) = torch.autograd.grad((quantizer(quantizer.bound(x)).z_q * weights).sum(), x)
    torch.testing.assert_close(gradient, weights * (1 - torch.tanh(x) ** 2))


def test_uniform_values_use_every_code_of_finite_scalars() -> None:
    quantizer = FiniteScalars((4, 4, 4)).train()
    out = quantizer(2 * torch.rand(1, 3, 32, 16, 16) - 1)
    assert out.codebook_usage == 1
    inner = torch.tensor([1 / 6, 1 / 3, 1 / 3, 1 / 6])  # the outermost intervals are half as wide
    torch.testing.assert_close(out.perplexity, torch.exp(-3 * (inner * inner.log()).sum()), rtol=0.02, atol=0.0)


def test_finite_scalars_forget_codes_that_are_no_longer_used() -> None:
    quantizer = FiniteScalars((8,)).train()
    quantizer(all_codes((8,)))
    one = torch.full((1, 1, 2, 2, 2), 0.9)
    for _ in range(USAGE_WINDOW_STEPS):
        out = quantizer(one)
    assert out.codebook_usage == 1 / 8
    before = copy.deepcopy(quantizer.state_dict())
    quantizer.eval()(all_codes((8,)))
    assert all(torch.equal(value, before[key]) for key, value in quantizer.state_dict().items())


def test_finite_scalars_are_fp32_under_autocast() -> None:
    quantizer = FiniteScalars((255,)).eval()
    z = torch.randn(1, 1, 8, 8, 8)
    expected = quantizer.lookup(quantizer.bound(z))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer(quantizer.bound(z)).z_q.sub(expected).abs() < 1e-6, torch.ones_like(z).bool())
        assert torch.equal(quantizer.lookup(quantizer.bound(z)), expected)


def test_two_ranks_count_the_codes_of_both() -> None:
    ranks = [FiniteScalars((8,)).train() for _ in range(2)]
    codes = all_codes((8,))
    run_ranks(ranks, [codes[:, :, :4], codes[:, :, 4:]])
    for quantizer in ranks:
        assert quantizer.usage() == 1
        torch.testing.assert_close(quantizer.perplexity(), torch.tensor(8.0))


def run_ranks(ranks: Sequence[Quantizer], batches: list[Tensor]) -> None:
    """One step of every rank, each in a thread; `reduce` meets at a barrier as an all-reduce does."""
    barrier = threading.Barrier(len(ranks), timeout=60)
    values: list[Tensor | None] = [None] * len(ranks)

    def work(rank: int) -> None:
        def reduce(value: Tensor) -> Tensor:
            values[rank] = value
            barrier.wait()
            total = sum(v for v in values if v is not None)
            barrier.wait()
            assert isinstance(total, Tensor)
            return total

        ranks[rank].rank = rank
        ranks[rank].reduce = reduce
        ranks[rank](batches[rank])

    with ThreadPoolExecutor(len(ranks)) as pool:
        for job in [pool.submit(work, rank) for rank in range(len(ranks))]:
            job.result()  # raises what the rank raised
