"""How the pipeline is sampled: steps, noise, encoders, memory, packages, and what is said about too few tokens."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from compressor_obs_diff import OBSDiff
from compressor_obs_diff.weightings import LogDecrease, Uniform
from torch import Tensor, nn

from compressor.calibration import Gradients, Group, Moments, StepCounter, sampling
from compressor.calibration.foretold import explain_rank
from compressor.calibration.packages import Package, cut
from compressor.errors import CompressorError
from compressor.pipeline import Pipeline
from compressor.plugin import MomentKind, Schedule, Weighting
from compressor.structure import Target, Trace
from tests import tiny
from tests.tiny import diffusers

# ------------------------------------------------------------------------------------------------------------- steps


class Numbers(Weighting):
    """The number of each step, from 0, plus one."""

    def weights(self, schedule: Schedule) -> tuple[float, ...]:
        return tuple(range(1, schedule.steps + 1))


def weights_used(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, steps: int, prompts: int = 1) -> list[float]:
    """The weight of every forward, by the first layer's input."""
    used: list[float] = []
    add = Moments.add
    monkeypatch.setattr(Moments, "add", lambda self, x, weight, *_: used.append(weight) or add(self, x, weight))
    calibration = tiny.calibrate(pipeline, tiny.PROMPTS[:prompts], steps=steps, batch=1, packages=1)
    (package,) = calibration.packages(pipeline.targets[:1], "norms", tiny.no_workspace)
    calibration.collect(package, "norms", Numbers())
    return used


SCHEDULERS = {
    "DDIM": ("sd2", diffusers.DDIMScheduler, [1, 2, 3, 4]),
    "Euler": ("sdxl", diffusers.EulerDiscreteScheduler, [1, 2, 3, 4]),
    "Euler ancestral": ("sd2", diffusers.EulerAncestralDiscreteScheduler, [1, 2, 3, 4]),
    "DPM++": ("sd2", diffusers.DPMSolverMultistepScheduler, [1, 2, 3, 4]),
    "DPM++ singlestep": ("sd2", diffusers.DPMSolverSinglestepScheduler, [1, 2, 3, 4]),
    "PNDM": ("sd2", diffusers.PNDMScheduler, [1, 2, 2, 3, 4]),
    "Heun": ("sd2", diffusers.HeunDiscreteScheduler, [1, 2, 2, 3, 3, 4, 4]),
    "flow Euler": ("sd3", diffusers.FlowMatchEulerDiscreteScheduler, [1, 2, 3, 4]),
    "flow Heun": ("sd3", diffusers.FlowMatchHeunDiscreteScheduler, [1, 2, 2, 3, 3, 4, 4]),
    "flow Euler, Flux": ("flux", None, [1, 2, 3, 4]),
}


@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_every_scheduler_gets_the_weight_of_its_step_and_never_overruns(name, monkeypatch):
    kind, scheduler, expected = SCHEDULERS[name]
    pipeline = tiny.load(kind)
    if scheduler is not None:
        settings = {"skip_prk_steps": True} if name == "PNDM" else {}
        pipeline.pipe.scheduler = scheduler.from_config(pipeline.pipe.scheduler.config, **settings)
    assert weights_used(pipeline, monkeypatch, 4, prompts=2) == expected * 2


@pytest.mark.parametrize("name", ["PNDM", "Heun", "DDIM", "flow Heun"])
def test_one_step_is_enough(name, monkeypatch):
    kind, scheduler, _ = SCHEDULERS[name]
    pipeline = tiny.load(kind)
    settings = {"skip_prk_steps": True} if name == "PNDM" else {}
    pipeline.pipe.scheduler = scheduler.from_config(pipeline.pipe.scheduler.config, **settings)
    assert set(weights_used(pipeline, monkeypatch, 1)) == {1}


def test_the_step_counter_finds_timesteps_in_the_schedule():
    counter = StepCounter(torch.tensor([900.0, 500.0, 500.0, 1.0]))
    assert counter.steps == 3
    assert [counter.step(t) for t in (900.0, torch.tensor(500), 900.0, torch.tensor([1.0, 1.0]))] == [0, 1, 0, 2]


def test_a_schedule_of_the_timestep_zero_alone_has_one_step():
    assert StepCounter(torch.tensor([0])).step(torch.tensor(0)) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_steps_that_half_precision_rounds_to_one_timestep_do_not_shift_later_ones(dtype):
    """Flux divides its timesteps by 1000 and casts them: of 500, bfloat16 tells few apart near the start."""
    schedule = torch.linspace(1000, 2, 500)
    rounded = (schedule.to(dtype) / 1000).to(dtype)
    counter = StepCounter(schedule)
    found = [counter.step(t) for t in rounded]
    if dtype == torch.bfloat16:
        assert len(rounded.unique()) < 400
    assert all(abs(step - i) <= 2 for i, step in enumerate(found))
    assert found[-1] == 499


TURNED = {
    "1 - t / T": lambda t: 1 - t / 1000,
    "T - t": lambda t: 1000 - t,
    "t": lambda t: t,
    "t / T": lambda t: t / 1000,
    "t / 250": lambda t: t / 250,
}


@pytest.mark.parametrize("form", list(TURNED))
@pytest.mark.parametrize("first", [1000.0, 999.0, 981.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_step_is_found_whichever_way_round_and_in_whatever_unit_the_timestep_is(form, first, dtype):
    schedule = torch.linspace(first, 21, 20)
    counter = StepCounter(schedule, 1000)
    given = [TURNED[form](t).to(dtype) for t in schedule for _ in range(2)]
    if form == "T - t" and first == 999:  # 1 is t / T as well, within rounding, and that is what it is taken for
        assert counter.step(given[0]) == 0
        assert counter.step(0.5) == 10
        return
    assert [counter.step(t) for t in given * 2] == [i for i in range(20) for _ in range(2)] * 2


# ------------------------------------------------------------------------------------------------- noise and encoders


class FirstLatents:
    """The latents of every prompt as the network first sees them, in order of the prompts."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.seen: list[Tensor] = []
        self._last: float | None = None
        self._guided = pipeline.folder.pipeline_class != "FluxPipeline"
        pipeline.module.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, _module: nn.Module, args: tuple, kwargs: dict) -> None:
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        value = float(torch.as_tensor(timestep).flatten()[0])
        if self._last is None or value > self._last:  # a new sampling begins
            latents = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            self.seen += (latents.chunk(2)[0] if self._guided else latents).clone().unbind()
        self._last = value


def noises(
    kind: str, batch: int, packages: int = 1, seed: int = 0, texts: tuple[str, ...] = tiny.PROMPTS[:5]
) -> list[Tensor]:
    pipeline = tiny.load(kind)
    first = FirstLatents(pipeline)
    calibration = tiny.calibrate(pipeline, texts, seed, batch=batch, packages=packages)
    for package in calibration.packages(pipeline.targets, "norms", tiny.no_workspace):
        calibration.collect(package, "norms", Uniform())
    return first.seen


@pytest.mark.parametrize("kind", ["sd3", "sd2", "flux"])
def test_every_prompt_has_its_own_noise_whatever_the_batch(kind):
    one_by_one = noises(kind, 1)
    assert len(one_by_one) == 5
    for i in range(5):
        for j in range(i):
            assert not torch.equal(one_by_one[i], one_by_one[j])
    for batch in (2, 5):
        assert all(torch.equal(a, b) for a, b in zip(noises(kind, batch), one_by_one, strict=True))


def test_every_prompt_keeps_its_noise_across_packages():
    once = noises("sd3", 2)
    thrice = noises("sd3", 2, packages=3)
    assert all(torch.equal(a, b) for a, b in zip(thrice, once * 3, strict=True))


def test_equal_prompts_have_noise_of_their_own():
    first, second = noises("sd3", 2, texts=("a cat", "a cat"))
    assert not torch.equal(first, second)


def test_the_recipes_seed_decides_the_noise():
    assert not torch.equal(noises("sd3", 1, seed=0)[0], noises("sd3", 1, seed=1)[0])
    assert not torch.equal(noises("sd3", 1, seed=0)[0], noises("sd3", 1, seed=2**40)[0])


def test_noise_seeds_differ_where_the_generator_looks():
    seeds = [
        sampling.noise_seed(s, use, i) for s in range(20) for use in ("calibration", "pictures") for i in range(50)
    ]
    low = {seed % 2**32 for seed in seeds}  # all that torch's generator on the CPU looks at
    assert len(low) == len(seeds)


def test_calibration_and_pictures_have_different_noise():
    pipeline = tiny.load("sd3")
    first = FirstLatents(pipeline)
    settings = sampling.Settings(2, 3.0, tiny.SIDE, tiny.SIDE)
    for use in ("calibration", "pictures"):
        sampling.sample(pipeline, sampling.encode(pipeline, ["a cat"], 3.0, 0, use), settings, "latent")
    assert not torch.equal(*first.seen)


@pytest.mark.parametrize("kind", list(tiny.KINDS))
def test_prompts_are_encoded_once_and_nothing_is_decoded(kind, monkeypatch):
    pipeline = tiny.load(kind)
    calls = dict.fromkeys((n for n in pipeline.pipe.components if n.startswith("text_encoder")), 0)

    def count(name: str):
        def hook(_module: nn.Module, _args: tuple) -> None:
            calls[name] += 1

        return hook

    for name in calls:
        encoder = getattr(pipeline.pipe, name)
        if encoder is not None:
            encoder.register_forward_pre_hook(count(name))
    monkeypatch.setattr(pipeline.pipe.vae, "decode", None)
    calibration = tiny.calibrate(pipeline, tiny.PROMPTS, batch=2, packages=3)
    encoded = dict(calls)
    texts = 1 if kind in ("flux", "sdxl") else 2  # SDXL puts zeros for the empty prompt, and Flux does without
    assert all(count == (0 if getattr(pipeline.pipe, name) is None else texts) for name, count in encoded.items())
    for package in calibration.packages(pipeline.targets, "norms", tiny.no_workspace):
        calibration.collect(package, "norms", Uniform())
    assert calls == encoded
    assert calibration.facts.packages == 3
    assert calibration.facts.forwards == 3 * 4 * 2


@pytest.mark.parametrize("kind", list(tiny.KINDS))
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_encoding_apart_gives_what_the_pipeline_gives_by_itself(kind, guidance):
    pipeline = tiny.load(kind)
    encoded = sampling.encode(pipeline, ["a red dog", "a cat"], guidance, 0, "pictures")
    settings = sampling.Settings(2, guidance, tiny.SIDE, tiny.SIDE)
    images, _ = sampling.sample(pipeline, encoded, settings, "pt")
    expected = pipeline.pipe(
        prompt=["a red dog", "a cat"],
        num_inference_steps=2,
        guidance_scale=guidance,
        height=tiny.SIDE,
        width=tiny.SIDE,
        generator=[torch.Generator().manual_seed(e.seed) for e in encoded],
        output_type="pt",
    ).images
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)
    assert images.shape == (2, 3, tiny.SIDE, tiny.SIDE)
    assert 0 <= images.min() < images.max() <= 1


# ------------------------------------------------------------------------------------------------------------- memory


def refuse_above(pipeline: Pipeline, batch: int, error: RuntimeError) -> None:
    """Lets the network run out of memory above a batch."""

    def hook(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        latents = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        if len(latents) > 2 * batch:  # guided
            raise error

    pipeline.module.register_forward_pre_hook(hook, with_kwargs=True)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["gpu", "cpu"],
)
def test_the_batch_halves_when_memory_runs_out_and_the_moments_are_the_same(error):
    pipeline = tiny.load("sd2")
    calibration = tiny.calibrate(pipeline, tiny.PROMPTS[:6], batch=2, packages=1)
    (package,) = calibration.packages(pipeline.targets, "second", tiny.no_workspace)
    expected = calibration.collect(package, "second", LogDecrease())
    tired = tiny.calibrate(pipeline, tiny.PROMPTS[:6], batch=8, packages=1)
    refuse_above(pipeline, 2, error)
    found = tired.collect(package, "second", LogDecrease())
    assert tired.facts.batch == 2
    assert tired.facts.warnings == [
        "memory ran out: calibration goes on with a batch of 4",
        "memory ran out: calibration goes on with a batch of 2",
    ]
    assert tired.facts.packages == 1
    assert tired.facts.tokens == calibration.facts.tokens
    for name, moments in expected.items():
        assert moments.second_II is not None
        second_II = found[name].second_II
        assert second_II is not None
        assert torch.equal(second_II, moments.second_II)
        assert torch.equal(found[name].total_I, moments.total_I)
        assert torch.equal(found[name].tokens, moments.tokens)


def test_memory_that_runs_out_half_way_counts_no_token_twice():
    pipeline = tiny.load("sd2")
    calibration = tiny.calibrate(pipeline, tiny.PROMPTS[:4], batch=2, packages=1)
    (package,) = calibration.packages(pipeline.targets, "second", tiny.no_workspace)
    calls = 0

    def hook(_module: nn.Module, _args: tuple) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise torch.OutOfMemoryError("later")

    pipeline.module.register_forward_pre_hook(hook)
    found = calibration.collect(package, "second", Uniform())
    expected = tiny.calibrate(pipeline, tiny.PROMPTS[:4], batch=1, packages=1).collect(package, "second", Uniform())
    assert all(torch.equal(found[name].tokens, moments.tokens) for name, moments in expected.items())
    assert all(torch.equal(found[name].squares_I, moments.squares_I) for name, moments in expected.items())


def test_running_out_of_memory_with_one_prompt_says_what_to_do():
    pipeline = tiny.load("sd2")
    calibration = tiny.calibrate(pipeline, batch=2, packages=1)
    (package,) = calibration.packages(pipeline.targets, "second", tiny.no_workspace)
    refuse_above(pipeline, 0, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(CompressorError) as caught:
        calibration.collect(package, "second", Uniform())
    assert str(caught.value) == (
        f"out of memory with a single prompt and {package.moment_bytes:,} bytes of moments: give calibration.memory "
        "less than is free (or more packages), a smaller height and width, or float16 as model.dtype"
    )


def test_other_failures_of_the_network_are_not_taken_for_a_lack_of_memory():
    pipeline = tiny.load("sd2")
    calibration = tiny.calibrate(pipeline, batch=2, packages=1)
    (package,) = calibration.packages(pipeline.targets, "second", tiny.no_workspace)
    refuse_above(pipeline, 0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        calibration.collect(package, "second", Uniform())
    assert calibration.facts.batch == 2


# ---------------------------------------------------------------------------------------------- tokens that overflow


def poison(target: Target, rows: list[int]) -> None:
    """Makes the layer's input infinite at some tokens of every sample, behind everything else."""

    def hook(_module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        x = args[0].clone()
        x[:, rows] = float("inf")
        return (x,)

    target.module.register_forward_pre_hook(hook, prepend=True)


def test_tokens_that_are_not_finite_are_left_out_and_reported():
    pipeline = tiny.load("sd3")
    last = pipeline.targets[-1]
    calibration = tiny.calibrate(pipeline, packages=1)
    (package,) = calibration.packages(pipeline.targets, "second", tiny.no_workspace)
    expected = calibration.collect(package, "second", Uniform())
    other = tiny.calibrate(pipeline, packages=1)
    poison(last, [0, 3])
    found = other.collect(package, "second", Uniform())
    # 3 prompts, guided, in 2 steps: 12 samples of 16 tokens, two of which are spoilt; and each one's final
    # latents are not finite, but only the first step comes before that
    assert int(found[last.name].skipped) == other.facts.skipped[last.name] > 0
    assert f"{last.name}: {int(found[last.name].skipped)} of" in other.facts.warnings[-1]
    assert other.facts.warnings[-1].endswith("tokens were not finite and were left out of its moments")
    assert torch.isfinite(found[last.name].squares_I).all()
    assert int(found[last.name].tokens + found[last.name].skipped) == int(expected[last.name].tokens)


def test_a_layer_that_is_fed_nothing_finite_is_an_error_that_names_it():
    pipeline = tiny.load("sd3")
    last = pipeline.targets[-1]
    calibration = tiny.calibrate(pipeline, packages=1)
    (package,) = calibration.packages([last], "second", tiny.no_workspace)
    poison(last, list(range(16)))
    with pytest.raises(CompressorError) as caught:
        calibration.collect(package, "second", Uniform())
    assert str(caught.value) == (
        f"{last.name}: none of the {3 * 2 * 2 * 16} tokens that reached it was finite; compute in float32 or bfloat16 "
        "(model.dtype)"
    )


# --------------------------------------------------------------------------------------------------- sharing of inputs


GROUPS = {
    "sd3": ("transformer_blocks.0.attn.to_q", ["attn.to_q", "attn.to_k", "attn.to_v"]),
    "flux": (
        "single_transformer_blocks.0.attn.to_q",
        ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
    ),
}


@pytest.mark.parametrize("kind", list(GROUPS))
def test_query_key_and_value_share_one_set_of_moments(kind):
    first, suffixes = GROUPS[kind]
    pipeline = tiny.load(kind)
    (package,) = tiny.calibrate(pipeline, packages=1).packages(pipeline.targets, "second", tiny.no_workspace)
    (group,) = [group for group in package.groups if group.name == first]
    block = group.targets[0].block
    assert [target.name for target in group.targets] == [f"{block}.{suffix}" for suffix in suffixes]


def test_the_second_attention_of_sd35_has_an_input_of_its_own():
    pipeline = tiny.load("sd35")
    (package,) = tiny.calibrate(pipeline, packages=1).packages(pipeline.targets, "second", tiny.no_workspace)
    members = {group.name: [t.layer.suffix for t in group.targets] for group in package.groups}
    assert members["transformer_blocks.0.attn.to_q"] == ["attn.to_q", "attn.to_k", "attn.to_v"]
    assert members["transformer_blocks.0.attn2.to_q"] == ["attn2.to_q", "attn2.to_k", "attn2.to_v"]


def test_cross_attention_of_all_blocks_shares_the_prompts_embedding():
    pipeline = tiny.load("sd2")
    (package,) = tiny.calibrate(pipeline, packages=1).packages(pipeline.targets, "second", tiny.no_workspace)
    (group,) = [group for group in package.groups if group.targets[0].layer.stream == "text"]
    text = [target for target in pipeline.targets if target.name.endswith(("attn2.to_k", "attn2.to_v"))]
    assert list(group.targets) == text
    assert len(text) == 8


@pytest.mark.parametrize("kind", list(tiny.KINDS))
def test_every_input_is_summed_once_a_forward(kind, monkeypatch):
    calls: list[int] = []
    add = Moments.add
    monkeypatch.setattr(Moments, "add", lambda self, x, weight, *_: calls.append(x.data_ptr()) or add(self, x, weight))
    pipeline = tiny.load(kind)
    calibration = tiny.calibrate(pipeline, ("a cat",), steps=1, packages=1)
    (package,) = calibration.packages(pipeline.targets, "norms", tiny.no_workspace)
    distinct: set[int] = set()
    kept: list[Tensor] = []  # so that no address is used again
    for target in pipeline.targets:
        target.module.register_forward_pre_hook(lambda _m, args: kept.append(args[0]) or distinct.add(id(args[0])))
    calibration.collect(package, "norms", Uniform())
    assert len(calls) == len(package.groups) == len(distinct) < len(pipeline.targets)


# ----------------------------------------------------------------------------------------------------------- packages


def run_of_units(start: int, stop: int) -> list[str]:
    return [name for unit in units_by_hand()[start:stop] for name in unit]


def units_by_hand() -> list[list[str]]:
    """The paper's units of a two-block SD3, whose last block has no text output."""
    units = []
    for block, last in (("transformer_blocks.0.", False), ("transformer_blocks.1.", True)):
        for suffixes in (
            ["attn.to_q", "attn.to_k", "attn.to_v", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
            ["attn.to_out.0"] if last else ["attn.to_out.0", "attn.to_add_out"],
            ["ff.net.0.proj"] if last else ["ff.net.0.proj", "ff_context.net.0.proj"],
            ["ff.net.2"] if last else ["ff.net.2", "ff_context.net.2"],
        ):
            units.append([block + suffix for suffix in suffixes])
    return units


@functools.cache
def sd3() -> tuple[tuple[Target, ...], Trace]:
    pipeline = tiny.load("sd3")
    return pipeline.targets, tiny.traced(pipeline)


def cut_sd3(kind: MomentKind, number: int | None, memory: int | None) -> tuple[Package, ...]:
    targets, trace = sd3()
    return cut(targets, trace, kind, number, memory, tiny.no_workspace)


def names(packages: tuple[Package, ...]) -> list[list[str]]:
    return [[target.name for group in package.groups for target in group.targets] for package in packages]


@pytest.mark.parametrize(
    ("number", "bounds"),
    [
        (1, [0, 8]),
        (2, [0, 4, 8]),
        (3, [0, 3, 5, 8]),
        (4, [0, 2, 4, 6, 8]),
        (8, list(range(9))),
        (None, [0, 2, 4, 6, 8]),
    ],
)
def test_packages_are_contiguous_runs_of_the_papers_units(number, bounds):
    expected = [run_of_units(a, b) for a, b in pairwise(bounds)]
    packages = cut_sd3("second", number, None)
    assert names(packages) == expected
    assert [(p.number, p.count) for p in packages] == [(i + 1, len(expected)) for i in range(len(expected))]


def test_packages_by_memory_hold_as_many_units_as_fit():
    # widths: 16 into q, k, v, outputs and ups, 64 into downs; 4 bytes for each of w * w sums of products, 2 * w others
    small, large = 4 * 16 * 18, 4 * 64 * 66
    sizes = [2 * small, 2 * small, 2 * small, 2 * large, 2 * small, small, small, large]
    everything = cut_sd3("second", None, sum(sizes))
    assert len(everything) == 1
    assert everything[0].moment_bytes == sum(sizes)
    packages = cut_sd3("second", None, 2 * large + 3 * small)
    assert names(packages) == [run_of_units(0, 3), run_of_units(3, 6), run_of_units(6, 8)]
    assert [p.moment_bytes for p in packages] == [6 * small, 2 * large + 3 * small, large + small]
    one_less = cut_sd3("second", None, sum(sizes) - 1)
    assert names(one_less) == [run_of_units(0, 7), run_of_units(7, 8)]


def test_norms_take_two_numbers_an_input():
    (package,) = cut_sd3("norms", 1, None)
    assert package.moment_bytes == 4 * 2 * (10 * 16 + 3 * 64)


def test_more_packages_than_units_are_refused():
    with pytest.raises(CompressorError) as caught:
        cut_sd3("second", 9, None)
    assert str(caught.value) == (
        "calibration.packages: should be at most 8, the number of units of layers that run side by side, found 9"
    )


def test_memory_too_small_for_one_unit_is_refused_by_name():
    with pytest.raises(CompressorError) as caught:
        cut_sd3("second", None, 33_791)
    assert str(caught.value) == (
        "calibration.memory: should be at least 33,792 bytes: transformer_blocks.0.ff.net.2 and the layers beside it "
        "need 33,792 for their moments; found 33,791"
    )


def test_memory_is_for_what_prunes_a_unit_as_well():
    small, large = 4 * 16 * 18, 4 * 64 * 66  # the moments of an input
    targets, trace = sd3()

    def workspace(groups: Sequence[Group]) -> int:
        return 1000 * max(group.inputs for group in groups)

    memory = 6 * small + 2 * large + 64_000
    packages = cut(targets, trace, "second", None, memory, workspace)
    assert names(packages) == [run_of_units(0, 4), run_of_units(4, 8)]
    assert [(package.memory, package.workspace) for package in packages] == [(memory, 64_000)] * 2
    packages = cut(targets, trace, "second", None, memory - 1, workspace)
    assert names(packages) == [run_of_units(0, 3), run_of_units(3, 7), run_of_units(7, 8)]
    with pytest.raises(CompressorError) as caught:
        cut(targets, trace, "second", None, 97_791, workspace)
    assert str(caught.value) == (
        "calibration.memory: should be at least 97,792 bytes: transformer_blocks.0.ff.net.2 and the layers beside it "
        "need 33,792 for their moments and 64,000 to be pruned; found 97,791"
    )


def test_a_package_knows_what_its_memory_has_room_for_beside_the_moments_that_are_held():
    (package,) = cut_sd3("second", 1, None)
    moments = {"a": Moments.empty(16, True, torch.device("cpu")), "b": Moments.empty(64, False, torch.device("cpu"))}
    moments["b"].gradients["c"] = Gradients.empty(8, torch.device("cpu"))
    assert package.room(moments) is None
    held = 4 * 16 * 18 + 4 * 2 * 64 + 4 * 64
    assert dataclasses.replace(package, memory=held + 5).room(moments) == 5
    assert dataclasses.replace(package, memory=1).room({}) == 1


def test_few_layers_make_fewer_packages_where_none_are_asked_for():
    targets, trace = sd3()
    assert len(cut(targets[:3], trace, "second", None, None, tiny.no_workspace)) == 1


def test_layers_whose_first_sharer_is_left_out_still_share():
    targets, trace = sd3()
    (package,) = cut(targets[1:3], trace, "second", 1, None, tiny.no_workspace)
    (group,) = package.groups
    assert group.name == "transformer_blocks.0.attn.to_k"
    assert [target.layer.role for target in group.targets] == ["key", "value"]


def test_later_packages_see_the_network_as_pruned_so_far(monkeypatch):
    pipeline = tiny.load("sd3")
    dense = {target.name: target.module.weight.clone() for target in pipeline.targets}
    calibration = tiny.calibrate(pipeline, packages=4)
    sums = []
    collect = calibration.collect

    def watched(package, kind, weighting):
        ours = {target.name for group in package.groups for target in group.targets}
        for earlier in names(tuple(done)):
            for name in earlier:
                weight = pipeline.module.get_submodule(name).weight
                assert isinstance(weight, Tensor)
                assert int((weight == 0).sum()) >= weight.numel() // 2
        assert all(torch.equal(t.module.weight, dense[t.name]) for t in pipeline.targets if t.name in ours)
        moments = collect(package, kind, weighting)
        done.append(package)
        sums.append({name: m.squares_I.clone() for name, m in moments.items()})
        return moments

    done: list[Package] = []
    monkeypatch.setattr(calibration, "collect", watched)
    list(OBSDiff.model_validate({"sparsity": 0.5}).prune(tiny.component(pipeline), calibration))
    assert len(done) == 4
    untouched = tiny.load("sd3")
    reference = tiny.calibrate(untouched, packages=4)
    for package, found in zip(reference.packages(untouched.targets, "second", tiny.no_workspace), sums, strict=True):
        expected = reference.collect(package, "second", LogDecrease())
        same = [torch.equal(expected[name].squares_I, squares_I) for name, squares_I in found.items()]
        assert all(same) if package.number == 1 else not any(same)


# ---------------------------------------------------------------------------------------------------- rank of moments


def test_with_gradients_the_inputs_of_a_share_of_the_steps_are_counted_and_enough_prompts_are_enough():
    pipeline = tiny.load("sd2")
    trace = tiny.traced(pipeline)
    wide = [dataclasses.replace(t, module=nn.Linear(6144, 8)) for t in pipeline.targets if trace.tokens[t.name] == 16]
    wide = [target for target in wide if target.name not in trace.constant][:1]
    assert explain_rank(wide, trace, "second", 20, 20, False) is None  # 20 x 20 x 16 = 6400
    note = explain_rank(wide, trace, "gradients", 40, 20, False)  # 200 steps of prompts, of 800
    assert note is not None
    assert "sees 3200 for 6144 inputs; about 116 prompts would do" in note  # a sixth of 116 x 20, x 16, is 6187
    assert explain_rank(wide, trace, "gradients", 116, 20, False) is None
    assert "about 116 prompts" in str(explain_rank(wide, trace, "gradients", 115, 20, False))


def test_too_few_tokens_for_full_rank_are_told_in_figures():
    pipeline = tiny.load("sd2")
    trace = tiny.traced(pipeline)
    # the image has 64 tokens in the blocks at full size and 16 inside; 3 prompts x guided x 2 steps are 12 samples of
    # each. The prompt's 16 tokens are the same at every step: 3 prompts and the empty one.
    assert explain_rank(pipeline.targets, trace, "second", 3, 2, True) is None
    # one prompt, one step, unguided: 16 tokens for 32 inputs of the 8 keys and values; 16 tokens in the middle block,
    # of 16 inputs but for the feed-forward's output, of 64; 64 at full size, of at most 32
    inner = [t for t in pipeline.targets if t.block.startswith("mid_block")]
    assert {trace.tokens[t.name] for t in inner if t.layer.stream == "image"} == {16}
    note = explain_rank(pipeline.targets, trace, "second", 1, 1, False)
    assert note == (
        "9 of 40 layers see fewer distinct tokens than they have inputs, so that damping decides: "
        "mid_block.attentions.0.transformer_blocks.0.ff.net.2 sees 16 for 64 inputs; about 4 prompts would do"
    )
    # guided over 10 steps the images suffice, but there are only 2 x 16 tokens of text for any one prompt
    assert explain_rank(pipeline.targets, trace, "second", 1, 10, True) is None
    assert explain_rank(pipeline.targets, trace, "second", 1, 10, False) == (
        "8 of 40 layers see fewer distinct tokens than they have inputs, so that damping decides: "
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k sees 16 for 32 inputs; about 2 prompts would do"
    )


def test_the_warning_is_given_when_second_moments_are_asked_for():
    pipeline = tiny.load("sd2")
    calibration = tiny.calibrate(pipeline, ("a cat",), steps=1, guidance=1.0)
    calibration.packages(pipeline.targets, "norms", tiny.no_workspace)
    assert calibration.facts.warnings == []
    calibration.packages(pipeline.targets, "second", tiny.no_workspace)
    assert [w[:18] for w in calibration.facts.warnings] == ["9 of 40 layers see"]


def test_flux_is_not_run_on_the_empty_prompt():
    assert not sampling.guided(tiny.load("flux").folder, 7.0)
    assert sampling.guided(tiny.load("sd3").folder, 7.0)
    assert not sampling.guided(tiny.load("sd3").folder, 1.0)
    for kind in tiny.KINDS:
        pipeline = tiny.load(kind)
        sizes: list[int] = []
        first = pipeline.targets[0].module

        def note(_module: nn.Module, args: tuple[Tensor], sizes: list[int] = sizes) -> None:
            sizes.append(len(args[0]))

        first.register_forward_pre_hook(note)
        calibration = tiny.calibrate(pipeline, ("a cat",), steps=1, packages=1)
        (package,) = calibration.packages(pipeline.targets[:1], "norms", tiny.no_workspace)
        calibration.collect(package, "norms", Uniform())
        assert sizes == [2 if sampling.guided(pipeline.folder, 3.0) else 1]


@pytest.mark.parametrize(("kind", "clip"), [("sd3", tiny.CLIP_TOKENS), ("flux", 0)])
def test_the_length_of_the_t5_part_is_what_the_network_is_given(kind, clip):
    pipeline = tiny.load(kind)
    assert tiny.traced(pipeline).tokens["transformer_blocks.0.attn.add_q_proj"] == clip + (256 if clip else 512)
    fed: list[Tensor] = []
    (text,) = [t for t in pipeline.targets if t.name == "transformer_blocks.0.attn.add_q_proj"]
    tiny.record_inputs(text.module, fed)
    calibration = tiny.calibrate(pipeline, ("a cat",), steps=1, packages=1, max_sequence_length=24)
    calibration.collect(calibration.packages([text], "norms", tiny.no_workspace)[0], "norms", Uniform())
    assert [x.shape[1] for x in fed] == [clip + 24]


def test_more_samples_asked_for_than_there_are_prompts_is_told():
    calibration = tiny.calibrate(tiny.load("sd3"), samples=100)
    assert calibration.facts.warnings == ["calibration.samples asks for 100 prompts and there are 3; all were used"]
