"""Greedy structured removal against least squares and brute force on explicit tokens, in float64."""

# Shapes: O outputs, I inputs, T tokens, G groups, D inputs of a group, R removals, S streams.

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compressor_obs_diff import greedy, removal
from compressor_obs_diff.greedy import Fusion
from compressor_obs_diff.removal import (
    Problem,
    Refit,
    Removal,
    Stream,
    costs_together,
    refit_together,
    remove_greedily,
    remove_together,
)
from torch import Tensor

from compressor.errors import CompressorError

DAMPING = 0.01
FUSIONS: tuple[Fusion, ...] = ("energy", "rank_fusion")


def tokens(inputs: int, seed: int, count: int = 90, mean: float = 0.0) -> Tensor:
    """Correlated tokens in float64."""
    generator = torch.Generator().manual_seed(seed)
    mixing_II = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    shift_I = mean * torch.randn(inputs, generator=generator, dtype=torch.float64)
    return torch.randn(count, inputs, generator=generator, dtype=torch.float64) @ mixing_II + shift_I


def weights(outputs: int, inputs: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)


def stream(weight_OI: Tensor, x_TI: Tensor, name: str = "to_out") -> Stream:
    return Stream(name, weight_OI, x_TI.T @ x_TI)


def fit(one: Stream, columns: list[int], damping: float = DAMPING) -> Refit:
    return refit_together([one], [columns], [damping])[0]


def heads(count: int, width: int) -> Tensor:
    return torch.arange(count * width).reshape(count, width)


def damped(x_TI: Tensor, damping: float = DAMPING) -> Tensor:
    """Tokens whose second moment is the damped Hessian: damping as extra rows."""
    scale = (damping * x_TI.square().sum(0).mean()).sqrt()
    return torch.cat([x_TI, scale * torch.eye(x_TI.shape[1], dtype=x_TI.dtype)])


def least_squares(weight_OI: Tensor, x_TI: Tensor, columns: list[int]) -> tuple[Tensor, float]:
    """The weights on some columns whose outputs come nearest, and the squared distance."""
    wanted_TO = x_TI @ weight_OI.T
    new_KO = torch.linalg.lstsq(x_TI[:, columns], wanted_TO).solution
    return new_KO.T, (x_TI[:, columns] @ new_KO - wanted_TO).square().sum().item()


def fuse(costs: list[list[float]], energies: list[float], fusion: Fusion) -> list[float]:
    """The two rules as written, over lists; the lowest is removed."""
    if fusion == "energy":
        return [sum(cost[g] / e for cost, e in zip(costs, energies, strict=True)) for g in range(len(costs[0]))]
    scores = [0.0] * len(costs[0])
    for cost in costs:
        for rank, g in enumerate(sorted(range(len(cost)), key=lambda g: (cost[g], g))):
            scores[g] -= 1 / (60 + rank + 1)
    return scores


def brute_force(
    problems: list[tuple[Tensor, Tensor]], groups_GD: Tensor, count: int, fusion: Fusion
) -> tuple[list[int], list[Tensor]]:
    """Tries every remaining group in every step, solving for the rest from the dense weights by least squares."""
    energies = [(x_TI @ weight_OI.T).square().sum().item() for weight_OI, x_TI in problems]
    groups = groups_GD.tolist()
    left = list(range(len(groups)))
    columns = list(range(problems[0][0].shape[1]))
    errors = [0.0] * len(problems)
    removed: list[int] = []
    for _ in range(count):
        tried = [
            [least_squares(weight_OI, damped(x_TI), [i for i in columns if i not in groups[g]])[1] for g in left]
            for weight_OI, x_TI in problems
        ]
        costs = [[new - old for new in news] for news, old in zip(tried, errors, strict=True)]
        scores = fuse(costs, energies, fusion)
        place = scores.index(min(scores))
        errors = [news[place] for news in tried]
        columns = [i for i in columns if i not in groups[left[place]]]
        removed.append(left.pop(place))
    return removed, [least_squares(weight_OI, damped(x_TI), columns)[0] for weight_OI, x_TI in problems]


# -------------------------------------------------------------------------------------------------------- brute force


@pytest.mark.parametrize("panel", [1, 3, 128])
@pytest.mark.parametrize(("count", "width"), [(9, 1), (6, 2), (5, 3)])
@pytest.mark.parametrize("seed", range(2))
def test_order_and_weights_are_those_of_brute_force(panel, count, width, seed, monkeypatch):
    monkeypatch.setattr(greedy, "PANEL", panel)
    weight_OI, x_TI = weights(4, count * width, seed), tokens(count * width, seed)
    groups_GD = heads(count, width)
    found = remove_greedily([stream(weight_OI, x_TI)], groups_GD, count - 1, DAMPING)
    removed, (expected_OK,) = brute_force([(weight_OI, x_TI)], groups_GD, count - 1, "energy")
    assert found.removed == removed
    assert found.kept == sorted(set(range(count)) - set(removed))
    assert found.columns == [i for g in found.kept for i in groups_GD[g].tolist()]
    torch.testing.assert_close(found.refits[0].weight_OK, expected_OK, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_two_streams_are_fused_as_written(fusion, width, seed):
    problems = [(weights(4, 6 * width, seed), tokens(6 * width, seed))]
    problems.append((5 * weights(3, 6 * width, seed + 50), tokens(6 * width, seed + 50, count=40)))
    found = remove_greedily(
        [stream(*problem, name) for problem, name in zip(problems, ("image", "text"), strict=True)],
        heads(6, width),
        4,
        DAMPING,
        fusion,
    )
    removed, expected = brute_force(problems, heads(6, width), 4, fusion)
    assert found.removed == removed
    for refitted, expected_OK in zip(found.refits, expected, strict=True):
        torch.testing.assert_close(refitted.weight_OK, expected_OK, rtol=1e-8, atol=1e-8)


def test_the_rules_differ_over_two_streams_and_agree_over_one():
    first, second = ([stream(weights(4, 24, s), tokens(24, s))] for s in (3, 4))
    second[0] = replace(second[0], weight_OI=second[0].weight_OI * torch.linspace(0.01, 3, 24))
    orders = [remove_greedily(first + second, heads(24, 1), 20, DAMPING, fusion).removed for fusion in FUSIONS]
    assert orders[0] != orders[1]
    orders = [remove_greedily(first, heads(24, 1), 20, DAMPING, fusion).removed for fusion in FUSIONS]
    assert orders[0] == orders[1]


def test_ranks_that_tie_give_up_the_lower_index():
    costs_PSG = torch.tensor([[[1.0, 2.0, 3.0], [2.0, 1.0, 3.0]]], dtype=torch.float64)
    costs_PSG = torch.cat([costs_PSG, costs_PSG.flip(2)])
    out_PG = torch.zeros(2, 3, dtype=torch.bool)
    assert greedy.cheapest(costs_PSG, out_PG, torch.ones(2, 2), "rank_fusion").tolist() == [[0], [1]]


@pytest.mark.parametrize("fusion", FUSIONS)
def test_what_is_gone_is_neither_chosen_nor_ranked(fusion):
    generator = torch.Generator().manual_seed(0)
    costs_PSG = torch.rand(1, 2, 9, generator=generator, dtype=torch.float64)
    out_PG = torch.tensor([[True, False, False] * 3])
    left = (~out_PG[0]).nonzero()[:, 0]
    spoiled_PSG = costs_PSG.masked_fill(out_PG, torch.nan)
    among = greedy.cheapest(costs_PSG[:, :, left], out_PG[:, left], torch.ones(1, 2), fusion)
    assert greedy.cheapest(spoiled_PSG, out_PG, torch.ones(1, 2), fusion) == left[among]


def test_a_stream_without_output_has_no_say():
    silent = stream(torch.zeros(3, 8, dtype=torch.float64), tokens(8, 1))
    heard = stream(weights(4, 8, 2), tokens(8, 2))
    both = remove_greedily([silent, heard], heads(8, 1), 5, DAMPING)
    assert both.removed == remove_greedily([heard], heads(8, 1), 5, DAMPING).removed
    assert both.refits[0].error == 0


# ---------------------------------------------------------------------------------------------------------- downdates


def begin(streams: list[Stream], groups_GD: Tensor) -> greedy.Search:
    systems = removal._Systems(streams, [DAMPING] * len(streams))
    metrics = [one.metric_BKK for one in streams]
    return greedy.Search(systems.damped_NII, [systems.factorise()], systems.weights, metrics, groups_GD, len(streams))


@pytest.mark.parametrize("width", [1, 4])
def test_downdates_equal_inverting_what_is_left(width, monkeypatch):
    monkeypatch.setattr(greedy, "PANEL", 5)
    weight_OI, x_TI = weights(7, 32, 0), tokens(32, 0)
    groups_GD = heads(32 // width, width)
    search = begin([stream(weight_OI, x_TI)], groups_GD)
    left = list(range(len(groups_GD)))
    for group in (3, 0, 7, 5):
        search.remove(torch.tensor([[group]]))
        left.remove(group)
        columns_K = groups_GD[left].flatten()
        inverse_KK = torch.linalg.inv((damped(x_TI).T @ damped(x_TI))[columns_K][:, columns_K])
        new_OK, _ = least_squares(weight_OI, damped(x_TI), columns_K.tolist())
        costs = [
            torch.trace(new_OK[:, part] @ torch.linalg.inv(inverse_KK[part][:, part]) @ new_OK[:, part].T).item()
            for part in torch.arange(len(columns_K)).reshape(-1, width)
        ]
        torch.testing.assert_close(search.costs()[0, 0, left], torch.tensor(costs).double(), rtol=1e-5, atol=0)
    search.apply()
    inverse_CC, gram_CC = search.state_N2CC[0]
    torch.testing.assert_close(inverse_CC[columns_K][:, columns_K], inverse_KK, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gram_CC[columns_K][:, columns_K], new_OK.T @ new_OK, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("width", [1, 8])
def test_downdates_drift_so_little_that_inverting_anew_changes_nothing(width, monkeypatch):
    """Nearly singular: 40 tokens for 256 inputs, so that only the damping keeps the inverse finite."""
    one = stream(weights(16, 256, 5), tokens(256, 5, count=40))
    count = 256 // width * 3 // 4
    inversions = []
    invert = greedy.Search.invert
    monkeypatch.setattr(greedy.Search, "invert", lambda self: inversions.append(1) or invert(self))
    never = remove_greedily([one], heads(256 // width, width), count, 1e-4)
    assert not inversions
    monkeypatch.setattr(greedy, "REFRESH", 16)
    often = remove_greedily([one], heads(256 // width, width), count, 1e-4)
    assert len(inversions) > 10
    assert never.removed == often.removed
    torch.testing.assert_close(never.costs_RS, often.costs_RS, rtol=1e-7, atol=1e-10 * often.costs_RS.max().item())


def test_an_inverse_that_cannot_be_is_made_anew(monkeypatch):
    monkeypatch.setattr(greedy, "PANEL", 1)
    one = stream(weights(4, 8, 0), tokens(8, 0))
    search, sound = (begin([one], heads(8, 1)) for _ in range(2))
    search.state_N2CC[0, 0, 5, 5] *= 1e-3  # below 1 / H_jj
    for each in (search, sound):
        each.remove(torch.tensor([[2]]))
    left = [0, 1, 3, 4, 5, 6, 7]
    assert search.state_N2CC.shape[-1] == 7
    assert sound.state_N2CC.shape[-1] == 8
    expected_CC = sound.state_N2CC[0, 0][left][:, left]
    torch.testing.assert_close(search.state_N2CC[0, 0], expected_CC, rtol=1e-9, atol=1e-12)


def test_costs_add_up_to_the_damped_error_and_the_error_grows():
    weight_OI, x_TI = weights(6, 20, 1), tokens(20, 1)
    errors = []
    for count in range(10):
        found = remove_greedily([stream(weight_OI, x_TI)], heads(10, 2), count, DAMPING)
        new_OI = torch.zeros_like(weight_OI)
        new_OI[:, found.columns] = found.refits[0].weight_OK
        lost = (damped(x_TI) @ (new_OI - weight_OI).T).square().sum()
        torch.testing.assert_close(found.costs_RS.sum(), lost, rtol=1e-9, atol=1e-9)
        relative = (x_TI @ (new_OI - weight_OI).T).square().sum() / (x_TI @ weight_OI.T).square().sum()
        assert found.refits[0].error == pytest.approx(relative.item(), rel=1e-9, abs=1e-12)
        errors.append(found.refits[0].error)
    assert errors[0] == 0
    assert errors == sorted(errors)


# ----------------------------------------------------------------------------------------------------------- together


def problem(seed: int, width: int, streams: int, count: int, *, bias: bool = False, metric: bool = False) -> Problem:
    """24 inputs; no two problems alike, nor their numbers of outputs."""
    found: list[Stream] = []
    for s in range(streams):
        number = 10 * seed + s
        outputs = 4 + 2 * ((seed + s) % 3)
        x_TI = tokens(24, number, count=30 + 7 * seed, mean=2)
        one = stream(weights(outputs, 24, number), x_TI, f"{seed}.{s}")
        if bias:
            one = replace(one, bias_O=weights(outputs, 1, number)[:, 0], total_I=x_TI.sum(0), tokens=float(len(x_TI)))
        if metric:
            root_BKK = weights(outputs, outputs // 2, number + 1).view(2, outputs // 2, outputs // 2)
            one = replace(one, metric_BKK=root_BKK @ root_BKK.mT)
        found.append(one)
    return Problem(found, count)


def assert_same(found: Removal, expected: Removal) -> None:
    assert (found.kept, found.removed, found.columns) == (expected.kept, expected.removed, expected.columns)
    torch.testing.assert_close(found.costs_RS, expected.costs_RS, rtol=1e-8, atol=1e-8)
    for one, other in zip(found.refits, expected.refits, strict=True):
        torch.testing.assert_close(one.weight_OK, other.weight_OK, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(one.bias_O, other.bias_O, rtol=1e-10, atol=1e-10)
        assert one.error == pytest.approx(other.error, rel=1e-9, abs=1e-12)
        assert one.damping == other.damping


@pytest.mark.parametrize(("panel", "refresh"), [(128, 2048), (3, 2048), (4, 6)])
@pytest.mark.parametrize("extras", [{}, {"bias": True}, {"metric": True}, {"bias": True, "metric": True}])
@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("width", [1, 3])
def test_together_every_problem_gets_what_it_gets_alone(width, streams, extras, panel, refresh, monkeypatch):
    monkeypatch.setattr(greedy, "PANEL", panel)
    monkeypatch.setattr(greedy, "REFRESH", refresh)
    groups_GD = heads(24 // width, width)
    counts = [6, 3, 0, 6] if width == 3 else [17, 3, 0, 23]
    problems = [problem(seed, width, streams, count, **extras) for seed, count in enumerate(counts)]
    for fusion in FUSIONS if streams == 2 else FUSIONS[:1]:
        found = remove_together(problems, groups_GD, DAMPING, fusion)
        for one, each in zip(problems, found, strict=True):
            assert len(each.removed) == one.count
            assert_same(each, remove_greedily(one.streams, groups_GD, one.count, DAMPING, fusion))
        for costs_RS, each in zip(costs_together(problems, groups_GD, DAMPING, fusion), found, strict=True):
            assert torch.equal(costs_RS, each.costs_RS)


def test_a_problem_without_inputs_to_speak_of_does_not_spoil_those_beside_it():
    """With 2 tokens for 24 inputs and hardly any damping, it goes far beyond what it is to lose."""
    poor = Problem([stream(weights(4, 24, 8), tokens(24, 8, count=2))], 1)
    sound = problem(1, 1, 1, 22)
    found = remove_together([poor, sound], heads(24, 1), 1e-12, "energy")
    assert_same(found[1], remove_greedily(sound.streams, heads(24, 1), 22, 1e-12))
    assert len(found[0].removed) == 1


def test_damping_is_raised_for_the_problem_alone_that_needs_it():
    second_II = torch.ones(24, 24, dtype=torch.float64) - 1e-3 * torch.eye(24)
    needy, sound = Problem([Stream("needy", weights(3, 24, 0), second_II)], 5), problem(1, 1, 1, 7)
    for problems in ([needy, sound], [sound, needy]):
        found = {len(each.removed): each for each in remove_together(problems, heads(24, 1), 1e-7)}
        assert (found[5].refits[0].damping, found[7].refits[0].damping) == (pytest.approx(1e-2), 1e-7)
        assert_same(found[5], remove_greedily(needy.streams, heads(24, 1), 5, 1e-7))
        assert_same(found[7], remove_greedily(sound.streams, heads(24, 1), 7, 1e-7))


def test_among_several_a_hessian_of_nothing_names_its_layer():
    nothing = Problem([Stream("blocks.3.ff.net.2", weights(3, 24, 0), torch.zeros(24, 24))], 1)
    with pytest.raises(CompressorError, match=r"^blocks\.3\.ff\.net\.2: the mean of the squared inputs should be"):
        remove_together([problem(0, 1, 1, 1), nothing], heads(24, 1), DAMPING)


@pytest.mark.parametrize("count", [5, 20])
def test_costs_that_are_not_finite_name_the_layer_that_lost_by_them(count, monkeypatch):
    problems = [problem(0, 1, 1, 22), problem(1, 1, 1, count)]
    costs = greedy.Search.costs

    def spoiled(self: greedy.Search) -> Tensor:
        costs_PSG = costs(self)
        if len(self.places) >= 10:
            costs_PSG[1] = torch.nan
        return costs_PSG

    monkeypatch.setattr(greedy.Search, "costs", spoiled)
    if count == 5:  # what comes after the last one that it is to lose does not matter
        assert_same(remove_together(problems, heads(24, 1), DAMPING)[1], alone(problems[1], monkeypatch, costs))
    else:
        with pytest.raises(AssertionError, match=r"^1\.0: rounding has spoiled the inverse of its Hessian"):
            remove_together(problems, heads(24, 1), DAMPING)


def alone(one: Problem, monkeypatch: pytest.MonkeyPatch, costs: object) -> Removal:
    with monkeypatch.context() as patch:
        patch.setattr(greedy.Search, "costs", costs)
        return remove_greedily(one.streams, heads(24, 1), one.count, DAMPING)


def test_streams_refitted_together_are_as_refitted_alone():
    streams = [problem(seed, 1, 1, 0, bias=seed == 1).streams[0] for seed in range(3)]
    columns = [[1, 4, 5], [0, 7, 23], list(range(24))]
    for one, kept, each in zip(
        streams, columns, refit_together(streams, columns, [DAMPING, 0.1, DAMPING]), strict=True
    ):
        expected = fit(one, kept, each.damping)
        torch.testing.assert_close(each.weight_OK, expected.weight_OK, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(each.bias_O, expected.bias_O, rtol=1e-10, atol=1e-10)
        assert each.error == pytest.approx(expected.error, rel=1e-9, abs=1e-12)


def test_a_gpu_solves_as_many_together_as_half_of_its_memory_holds(monkeypatch):
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40 * gib, 141 * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 30 * gib)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10 * gib)
    gpu = torch.device("cuda:0")
    assert removal.fitting_together(gib, gpu, None) == 30
    assert removal.fitting_together(2 * gib + 1, gpu, None) == 14
    assert removal.fitting_together(gib // 8, gpu, None) == removal.MOST
    assert removal.fitting_together(50 * gib, gpu, None) == 1
    assert [removal.fitting_together(gib, gpu, room * gib) for room in (-1, 1, 7, 50)] == [1, 1, 7, 30]
    assert removal.fitting_together(64, torch.device("cpu"), None) == 1


# -------------------------------------------------------------------------------------------------------------- edges


def test_removing_nothing_gives_back_the_same_weights():
    weight_OI = weights(3, 8, 0).float()
    bias_O = torch.randn(3)
    one = replace(
        stream(weight_OI, tokens(8, 0, mean=2)), bias_O=bias_O, total_I=tokens(8, 0, mean=2).sum(0), tokens=90
    )
    found = remove_greedily([one], heads(4, 2), 0, DAMPING)
    assert (found.kept, found.removed, found.columns) == ([0, 1, 2, 3], [], list(range(8)))
    assert found.costs_RS.shape == (0, 1)
    assert torch.equal(found.refits[0].weight_OK, weight_OI)
    assert found.refits[0].bias_O is not None
    assert torch.equal(found.refits[0].bias_O, bias_O)
    assert found.refits[0].error == 0


def test_removing_every_group_is_refused():
    with pytest.raises(AssertionError):
        remove_greedily([stream(weights(3, 8, 0), tokens(8, 0))], heads(4, 2), 4, DAMPING)


def test_inputs_in_no_group_are_kept_and_make_up_for_the_others():
    """A Flux single block's output projection is fed heads and neurons side by side."""
    weight_OI, x_TI = weights(4, 12, 3), tokens(12, 3)
    found = remove_greedily([stream(weight_OI, x_TI)], heads(3, 2), 2, DAMPING)
    removed, (expected_OK,) = brute_force([(weight_OI, x_TI)], heads(3, 2), 2, "energy")
    assert found.removed == removed
    assert found.columns[-6:] == list(range(6, 12))
    torch.testing.assert_close(found.refits[0].weight_OK, expected_OK, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("refresh", [1, 2048])
@pytest.mark.parametrize("groups", [[[7, 0], [2, 5], [6, 1], [3, 4]], [[7], [2], [6], [3], [0]]])
def test_groups_may_be_scattered(groups, refresh, monkeypatch):
    monkeypatch.setattr(greedy, "REFRESH", refresh)
    weight_OI, x_TI = weights(4, 8, 3), tokens(8, 3)
    groups_GD = torch.tensor(groups)
    found = remove_greedily([stream(weight_OI, x_TI)], groups_GD, 3, DAMPING)
    removed, (expected_OK,) = brute_force([(weight_OI, x_TI)], groups_GD, 3, "energy")
    assert found.removed == removed
    assert found.columns == sorted(found.columns)
    torch.testing.assert_close(found.refits[0].weight_OK, expected_OK, rtol=1e-8, atol=1e-8)


def test_inputs_and_options_are_left_as_they_were():
    weight_OI, x_TI = weights(4, 8, 3), tokens(8, 3)
    one = stream(weight_OI.clone(), x_TI)
    second_II = one.second_II.clone()
    remove_greedily([one], heads(8, 1), 5, DAMPING)
    assert torch.equal(one.weight_OI, weight_OI)
    assert torch.equal(one.second_II, second_II)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_and_bias_come_back_in_their_dtype(dtype):
    x_TI = tokens(8, 0, mean=1)
    one = Stream("to_out", weights(3, 8, 0).to(dtype), (x_TI.T @ x_TI).float(), torch.ones(3).to(dtype))
    one = replace(one, total_I=x_TI.sum(0).float(), tokens=90)
    (refitted,) = remove_greedily([one], heads(8, 1), 4, DAMPING).refits
    assert refitted.bias_O is not None
    assert (refitted.weight_OK.dtype, refitted.bias_O.dtype) == (dtype, dtype)


def test_a_singular_hessian_is_damped_until_it_can_be_inverted():
    x_TI = torch.ones(5, 64, dtype=torch.float64)
    one = Stream("to_out", weights(3, 64, 0), x_TI.T @ x_TI - 1e-3 * torch.eye(64, dtype=torch.float64))
    found = remove_greedily([one], heads(16, 4), 10, 1e-7)
    assert found.refits[0].damping == pytest.approx(1e-3)
    assert found.refits[0].weight_OK.isfinite().all()


def test_what_float32_lets_pass_is_damped_further():
    """Below float32's resolution of 1, so that its factorisation cannot see that the matrix is indefinite."""
    second_II = torch.eye(4, dtype=torch.float64)
    second_II[0, 1] = second_II[1, 0] = 1 + 2e-8
    second_II *= 1.5  # so that the mean is no power of two
    systems = removal._Systems([Stream("to_out", weights(3, 4, 0), second_II)], [1e-8])
    (factor_II,) = systems.factorise()
    assert systems.dampings[0] > 1e-8
    expected_II = second_II + 1.5 * systems.dampings[0] * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(systems.damped_NII[0], expected_II, rtol=0, atol=1e-15)
    torch.testing.assert_close(factor_II.T @ factor_II @ expected_II, torch.eye(4).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_hessian_of_nothing_names_its_layer(value):
    one = Stream("blocks.0.ff.net.2", weights(3, 4, 0), torch.full((4, 4), value))
    with pytest.raises(CompressorError, match=r"^blocks\.0\.ff\.net\.2: the mean of the squared inputs should be"):
        remove_greedily([one], heads(4, 1), 2, DAMPING)


# --------------------------------------------------------------------------------------------------------------- bias


def with_bias(weight_OI: Tensor, x_TI: Tensor, a_T: Tensor, bias_O: Tensor | None) -> Stream:
    second_II = (a_T[:, None] * x_TI).T @ x_TI
    return Stream("to_out", weight_OI, second_II, bias_O, (a_T[:, None] * x_TI).sum(0), a_T.sum().item())


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_the_bias_absorbs_what_weighted_least_squares_says(width, seed):
    x_TI, weight_OI = tokens(12, seed, mean=4), weights(5, 12, seed)
    a_T = torch.linspace(0.8, 1.2, len(x_TI), dtype=torch.float64)
    bias_O = weights(5, 1, seed)[:, 0]
    found = remove_greedily([with_bias(weight_OI, x_TI, a_T, bias_O)], heads(12 // width, width), 3, 1e-12)
    (refitted,) = found.refits
    root_T1 = a_T.sqrt()[:, None]
    augmented_TJ = root_T1 * torch.cat([x_TI[:, found.columns], torch.ones(len(x_TI), 1)], dim=1)
    wanted_TO = root_T1 * (x_TI @ weight_OI.T + bias_O)
    expected_JO = torch.linalg.lstsq(augmented_TJ, wanted_TO).solution
    torch.testing.assert_close(refitted.weight_OK, expected_JO[:-1].T, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(refitted.bias_O, expected_JO[-1], rtol=1e-6, atol=1e-7)
    lost = (augmented_TJ @ expected_JO - wanted_TO).square().sum() / (root_T1 * (x_TI @ weight_OI.T)).square().sum()
    assert refitted.error == pytest.approx(lost.item(), rel=1e-6)


def test_the_order_is_that_of_the_augmented_moment_whose_constant_stays():
    x_TI, weight_OI = tokens(10, 7, mean=4), weights(5, 10, 7)
    found = remove_greedily(
        [with_bias(weight_OI, x_TI, torch.ones(90).double(), torch.zeros(5).double())], heads(10, 1), 7, 1e-12
    )
    augmented_TJ = torch.cat([x_TI, torch.ones(90, 1)], dim=1)
    weight_OJ = torch.cat([weight_OI, torch.zeros(5, 1)], dim=1)
    expected = remove_greedily([stream(weight_OJ, augmented_TJ)], heads(10, 1), 7, 1e-12)
    assert found.removed == expected.removed
    torch.testing.assert_close(found.costs_RS, expected.costs_RS, rtol=1e-5, atol=1e-6)
    assert found.refits[0].bias_O is not None
    augmented_OK = torch.cat([found.refits[0].weight_OK, found.refits[0].bias_O[:, None]], dim=1)
    torch.testing.assert_close(augmented_OK, expected.refits[0].weight_OK, rtol=1e-5, atol=1e-6)


def test_a_neuron_that_never_changes_is_free_with_a_bias():
    x_TI, weight_OI = tokens(6, 2), weights(4, 6, 2)
    x_TI[:, 3] = 5.0
    one = with_bias(weight_OI, x_TI, torch.ones(90).double(), torch.zeros(4).double())
    found = remove_greedily([one], heads(6, 1), 1, DAMPING)
    assert found.removed == [3]
    assert found.refits[0].error < 1e-12
    torch.testing.assert_close(found.refits[0].bias_O, 5 * weight_OI[:, 3], rtol=1e-9, atol=1e-9)
    assert fit(replace(one, bias_O=None), found.columns).error > 1e-3


def test_a_layer_without_a_bias_is_not_given_one():
    x_TI, weight_OI = tokens(6, 2, mean=3), weights(4, 6, 2)
    one = with_bias(weight_OI, x_TI, torch.ones(90).double(), None)
    assert not one.absorbs
    found = remove_greedily([one], heads(6, 1), 3, DAMPING)
    plain = remove_greedily([stream(weight_OI, x_TI)], heads(6, 1), 3, DAMPING)
    assert found.refits[0].bias_O is None
    assert torch.equal(found.refits[0].weight_OK, plain.refits[0].weight_OK)


def test_a_bias_stays_as_it_is_where_no_mean_is_given():
    x_TI, bias_O = tokens(6, 2, mean=3), torch.ones(4)
    one = replace(stream(weights(4, 6, 2), x_TI), bias_O=bias_O)
    assert not one.absorbs
    found = remove_greedily([one], heads(6, 1), 3, DAMPING)
    assert found.refits[0].bias_O is bias_O


def test_a_refit_of_any_columns_is_least_squares():
    weight_OI, x_TI = weights(4, 8, 3), tokens(8, 3)
    found = fit(stream(weight_OI, x_TI), [1, 4, 5])
    expected_OK, _ = least_squares(weight_OI, damped(x_TI), [1, 4, 5])
    torch.testing.assert_close(found.weight_OK, expected_OK, rtol=1e-9, atol=1e-9)


def test_the_order_of_summation_may_move_the_bias_of_an_almost_constant_input_and_hardly_its_outputs():
    """Subtracting the mean leaves little of float32 sums; what is lost moves weights that no token asks for."""
    random = torch.Generator().manual_seed(0)
    inputs, outputs = 16, 16
    mean_I = torch.randn(inputs, generator=random, dtype=torch.float64)
    reach_I = 0.15 * torch.logspace(0, -2, inputs, dtype=torch.float64)
    x_TI = (mean_I + reach_I * torch.randn(3264, inputs, generator=random, dtype=torch.float64)).float()
    weight_OI, bias_O = weights(outputs, inputs, 1), torch.randn(outputs, generator=random, dtype=torch.float64)
    columns = list(range(0, inputs, 2))

    def fitted(x_TI: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
        second_II, total_I = (torch.zeros(*[inputs] * n, dtype=dtype) for n in (2, 1))
        for part_TI in x_TI.to(dtype).split(544):
            second_II.addmm_(part_TI.T, part_TI)
            total_I += part_TI.sum(0)
        found = fit(Stream("to_add_out", weight_OI.double(), second_II, bias_O, total_I, float(len(x_TI))), columns)
        assert found.bias_O is not None
        return found.weight_OK, found.bias_O, found.error

    exact, one, other = (
        fitted(x_TI, torch.float64),
        fitted(x_TI, torch.float32),
        fitted(x_TI[torch.randperm(len(x_TI), generator=random)], torch.float32),
    )
    energy = (x_TI.double() @ weight_OI.double().T).square().sum()
    for a, b in ((one, other), (one, exact), (other, exact)):
        difference_TO = x_TI[:, columns].double() @ (a[0] - b[0]).T + (a[1] - b[1])
        assert difference_TO.square().sum() < 1e-8 * energy
        assert a[2] == pytest.approx(b[2], rel=1e-2)
    assert (one[1] - other[1]).abs().max() > 1e-4
