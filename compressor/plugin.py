"""What a plugin author writes against: pruners, exporters, metrics, weightings and granularities.

A plugin is a frozen pydantic model: its fields are its options in the recipe, its docstring is its help,
and one method does the work. Nothing here imports torch, so that recipes are checked in an instant;
a plugin's module should import its mathematics inside that method for the same reason.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from compressor.options import Options

if TYPE_CHECKING:
    from torch import Tensor

    from compressor import calibration
    from compressor.calibration import Calibration
    from compressor.pipeline import Folder, Pipeline
    from compressor.structure import Component, Group, Target

MomentKind = Literal["none", "norms", "second", "gradients"]


@dataclass(frozen=True)
class LayerResult:
    """What a pruner did to one linear layer.

    Attributes:
        name: the layer's dotted name in the component.
        error: ||W X - W' X||^2 / ||W X||^2 over the calibration tokens, as these count in the moments, or None where
            none were gathered.
        damping: what was added to the diagonal of the Hessian, relative to its mean; None without one.
        seconds: time spent on this layer.
        notes: what a user should know about this layer, one sentence each.
        zeros: how many weights were to become zero, from a pruner whose `bounds` leave a choice; None for as many as
            its `zeros` says.
    """

    name: str
    error: float | None = None
    damping: float | None = None
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    zeros: int | None = None


@dataclass(frozen=True)
class Removed:
    """Which heads or neurons of a group a pruner gave up; the run then takes them out of the network.

    The pruner has zeroed their columns in the layers that read them, and may have changed what is left there.

    Attributes:
        group: one of those that the pruner's `removals` promised.
        units: their indices, as many as promised, or as one of the `choices` says.
    """

    group: Group
    units: tuple[int, ...]


class Pruner(Options, ABC):
    """Changes the component in place. Registered in the entry-point group `compressor.pruners`."""

    @property
    def moments(self) -> MomentKind:
        """What this pruner asks of the calibration: nothing, per-input sums and norms, the full second moment, or
        second moments of the inputs and of the gradients at the layers' outputs, in which tokens count differently.
        """
        return "none"

    @abstractmethod
    def check(self, targets: Sequence[Target]) -> None:
        """Refuses layers that these options cannot prune; called by `plan` and before anything is calibrated.

        Args:
            targets: the layers chosen by the recipe; their modules may be on the meta device.

        Raises:
            CompressorError: naming the first layer that does not fit.
        """

    def leaves_out(self, target: Target, tokens: int) -> str | None:
        """Why a layer that the recipe chose is not to be pruned after all, or None; asked before `check`.

        Layers that are left out stay as they are, and are told in the plan and in the report.

        Args:
            target: one of the chosen layers; its module may be on the meta device.
            tokens: rows of its input in a forward of one sample, at the size that the recipe calibrates at.

        Raises:
            CompressorError: if what this depends on is missing.
        """
        return None

    @abstractmethod
    def zeros(self, target: Target) -> int:
        """How many weights of this layer will be zero, exactly; 0 for a pruner that removes heads and neurons.

        Where `bounds` leave a choice, the sum over all layers is meant: as many as if none were made.
        """

    def bounds(self, target: Target) -> tuple[int, int]:
        """The fewest and the most weights of this layer that will be zero; by default just as many as `zeros` says.

        A pruner that decides so late how to spread its zeros says in every `LayerResult` how many a layer was given.
        """
        return self.zeros(target), self.zeros(target)

    def passes(self, packages: int) -> int:
        """How often calibration will sample all prompts, where the layers are cut into so many packages."""
        return packages

    def workspace(self, groups: Sequence[calibration.Group]) -> int:
        """The most bytes that pruning takes at any time beside the moments of a package; 0 by default.

        They count towards `calibration.memory`. A pruner that could take more, to do several layers at once, takes no
        more than `Package.room` has.

        Args:
            groups: the layers of a package, by the input they share; their modules may be on the meta device.
        """
        return 0

    def removals(self, component: Component) -> Mapping[Group, int]:
        """How many heads or neurons will be removed, by group; nothing for a pruner that leaves every shape as it is.

        Groups that might have lost some, and lose none by rounding, have a 0. A pruner that removes is calibrated on
        what the consumers of the others read, and on nothing else.

        Args:
            component: the module, possibly on the meta device, and the layers chosen by the recipe.

        Raises:
            CompressorError: if the options leave nothing to remove, or nothing of a group.
        """
        return {}

    def choices(self, group: Group, count: int) -> tuple[int, ...]:
        """From which numbers of a group's heads or neurons calibration will choose, ascending; by default there is one.

        Where there are more, as many weights are to leave all groups together as `removals` says, but for less than
        one step between two numbers of any group.

        Args:
            group: one of `removals`.
            count: how many that says; one of the choices.
        """
        return (count,)

    def shares(self) -> Mapping[str, float]:
        """The shares of `heads` and of `neurons` that were asked for; what `removals` reaches differs by rounding."""
        return {}

    def holds(self, target: Target) -> bool:
        """Whether a pruned layer's stored weight has the pattern that was promised, such as N:M; asked after the run.

        The number of zeros is counted apart from this, so a pruner that promises no more than that leaves it as it is.
        """
        return True

    @abstractmethod
    def prune(self, component: Component, calibration: Calibration | None) -> Iterator[LayerResult | Removed]:
        """Prunes every layer of `component.targets` in place, yielding after each one.

        A pruner that removes heads and neurons yields one `Removed` for each group of which it promised some or might
        choose some, and a `LayerResult` for each of these groups' consumers.

        Args:
            component: the module, its family and the layers to prune. Its weights are changed.
            calibration: packages and moments on demand; samples the pipeline as pruned so far. Never None for a pruner
                whose `moments` is not `none`.

        Raises:
            CompressorError: naming the layer.
        """


class Granularity(Options, ABC):
    """Which weights stand or fall together: `Elementwise` or `Structured`. Registered in `compressor.granularities`."""

    needs_sparsity: ClassVar[bool] = False
    """Whether the pruner's `sparsity` says how much is removed; if not, the options of the granularity do."""


class Elementwise(Granularity):
    """Zeroes weights and keeps every shape.

    An elementwise granularity is asked for masks over blocks of whole columns, left to right, so that a solver which
    compensates as it goes can ask again with updated scores.
    """

    @abstractmethod
    def check(self, target: Target) -> None:
        """Raises a CompressorError naming the layer if its shape does not fit."""

    def leaves_out(self, target: Target, tokens: int) -> str | None:
        """Why a layer stays as it is, or None, as every layer is pruned by default; see `Pruner.leaves_out`."""
        return None

    @abstractmethod
    def columns(self, block: int) -> int:
        """The number of columns to be masked at a time, by a solver that works in blocks of `block`."""

    @abstractmethod
    def zeros(self, outputs: int, inputs: int, sparsity: float | None) -> int:
        """The exact number of zeros in the first `inputs` columns of a layer with `outputs` rows."""

    def holds(self, weight_OI: Tensor) -> bool:
        """Whether the zeros of a pruned weight lie where this granularity wants them; any place will do by default."""
        return True

    @abstractmethod
    def mask(self, score_OI: Tensor, zeros: int, *, per_row: bool = False) -> Tensor:
        """Which weights to remove: those of the lowest score.

        Args:
            score_OI: importance, outputs x inputs (a whole layer or a run of its columns).
            zeros: exactly how many to remove.
            per_row: compare weights within their output row only (Wanda's comparison group).

        Returns:
            Boolean tensor of the same shape, True where the weight goes; exactly `zeros` are True.
        """


class Structured(Granularity):
    """Takes whole heads or neurons out of the network, so that its matrices become smaller.

    A structured granularity says of which groups how many leave, or may leave; which ones is the pruner's to choose.
    """

    @abstractmethod
    def removals(self, component: Component) -> Mapping[Group, int]:
        """How many heads or neurons of each group will be removed, in order of execution; 0 where rounding says so.

        Args:
            component: the module, possibly on the meta device, and the layers that may change.

        Raises:
            CompressorError: if nothing could be removed, or nothing of a group would be left.
        """

    @abstractmethod
    def choices(self, group: Group, count: int, spread: float) -> tuple[int, ...]:
        """Which numbers of heads or neurons may leave a group whose share may differ from the one asked for.

        Args:
            group: one of `removals`.
            count: how many that says; one of the choices.
            spread: how far the share may be from the one asked for, above 0.

        Returns:
            Ascending.
        """

    @abstractmethod
    def shares(self) -> Mapping[str, float]:
        """The shares of `heads` and of `neurons` that are asked for; a kind that stays whole is left out."""


def check_sparsity(granularity: Granularity, sparsity: float | None) -> None:
    """For a pruner's validator: a sparsity is given exactly where the granularity needs one.

    Raises:
        ValueError: which pydantic turns into an error of the recipe.
    """
    if granularity.needs_sparsity and sparsity is None:
        raise ValueError("sparsity is missing; should be the share of weights to remove, such as 0.5")
    if not granularity.needs_sparsity and sparsity is not None:
        raise ValueError("sparsity has no effect: this granularity decides how much is removed; leave one of them out")


@dataclass(frozen=True)
class Schedule:
    """The inference steps of a sampling, as its scheduler was set up for it.

    Attributes:
        timesteps: the different ones, at least one, in sampling order: the first is the noisiest.
        scheduler: a copy of diffusers' own, before the first step; not to be changed, so copy it again to run it.
    """

    timesteps: tuple[float, ...]
    scheduler: Any = None

    @property
    def steps(self) -> int:
        """How many there are."""
        return len(self.timesteps)


class Weighting(Options, ABC):
    """How much each inference step counts in the moments. Registered in `compressor.weightings`."""

    @abstractmethod
    def weights(self, schedule: Schedule) -> tuple[float, ...]:
        """One weight for each step, in sampling order: none negative, not all zero; only their proportions matter.

        Raises:
            CompressorError: if this schedule has no such weights.
        """


@dataclass(frozen=True)
class Export:
    """What an exporter wrote.

    Attributes:
        files: relative to the export folder.
        checks: what was verified, each with its measured figures, JSON-serialisable.
    """

    files: tuple[Path, ...]
    checks: dict[str, Any] = field(default_factory=dict)


class Exporter(Options, ABC):
    """Writes files for another runtime and proves them. Registered in `compressor.exporters`."""

    @abstractmethod
    def available(self) -> str | None:
        """None if everything it needs is installed, else one line that says how to install it."""

    def check(self, folder: Folder) -> None:
        """Refuses a model that these options do not suit; asked before the model is loaded.

        Args:
            folder: the model's, as read from its JSON files.

        Raises:
            CompressorError: saying which option should be what.
        """

    def space(self, pipeline: Pipeline) -> int:
        """About how many bytes `export` will write; asked before anything is pruned. 0 where it cannot be told.

        Args:
            pipeline: as it is before the pruning. Not changed.

        Raises:
            CompressorError: if something of it cannot be exported, saying which option should be what.
        """
        return 0

    @abstractmethod
    def export(self, pipeline: Pipeline, folder: Path) -> Export:
        """Writes into `folder`, which exists and is empty.

        Args:
            pipeline: the pruned pipeline, as reloaded from its checkpoint. Not changed.
            folder: where the files go.

        Raises:
            CompressorError: if the written files do not compute what torch computes.
        """

    def verify(self, pipeline: Pipeline, folder: Path) -> dict[str, Any]:
        """Holds the files of an earlier export against the pipeline again; their hashes are checked apart from this.

        Args:
            pipeline: the one that they were written from. Not changed.
            folder: as `export` left it.

        Returns:
            The measured figures; none of an exporter that has nothing to prove anew.

        Raises:
            CompressorError: if the files do not compute what torch computes.
        """
        return {}


@dataclass(frozen=True)
class Samples:
    """Images drawn twice from equal noise: by the dense pipeline and by the pruned one.

    Attributes:
        prompts: N captions.
        dense: N x 3 x H x W in [0, 1], on the CPU.
        pruned: the same shape, from the pruned component.
        dense_latents: N x ... final latents of the dense pipeline, on the CPU.
        pruned_latents: the same shape.
    """

    prompts: tuple[str, ...]
    dense: Tensor
    pruned: Tensor
    dense_latents: Tensor
    pruned_latents: Tensor


class Metric(Options, ABC):
    """Figures from pairs of images. Registered in `compressor.metrics`."""

    @abstractmethod
    def applies(self, source: str) -> bool:
        """Whether this metric is taken by default for a model of this source (`builtin:shapes`, a folder, a hub id)."""

    @abstractmethod
    def measure(self, samples: Samples) -> dict[str, float]:
        """Named figures; a name ending in `_se` is the standard error of the figure it follows."""
