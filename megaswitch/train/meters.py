"""All that a step counts, so that a bad one can be taken back."""

from __future__ import annotations

from megaswitch.config import RunConfig
from megaswitch.layers.vocab import TokenLosses
from megaswitch.model.switch_transformer import SwitchOutput
from megaswitch.parallel.mesh import Mesh
from megaswitch.train.distill import Distillation
from megaswitch.train.metrics import LayerLoad, LossMeter, RouterMeter, SourceMeter, router_metrics
from megaswitch.train.objectives import MicroBatch


class Meters:
    """Losses, routing and sources of training steps since the last reading.

    Args:
        config: of the run.
        mesh: the ranks.
        source_names: of a mixture.
        distillation: whose sums are read and taken back with the others.
    """

    def __init__(
        self,
        config: RunConfig,
        mesh: Mesh,
        source_names: tuple[str, ...],
        distillation: Distillation | None,
    ) -> None:
        self.mesh, self.distillation = mesh, distillation
        self.losses = LossMeter(mesh.device)
        self.router = RouterMeter(config.model, mesh.device)
        self.sources = SourceMeter(source_names, mesh.device)
        self.routing = False  # whether the routing of this step is counted
        self.loads: dict[str, LayerLoad] = {}  # of the last reading
        self._sums = [self.losses.sums, self.sources.sums, *self.router.layers.values()]
        self._sums += [distillation.sums] if distillation else []
        self._before = [sums.clone() for sums in self._sums]

    def begin(self, *, routing: bool) -> None:
        """A step begins; its routing counts, or does not."""
        self.routing = routing
        for kept, sums in zip(self._before, self._sums, strict=True):
            kept.copy_(sums)

    def record(self, output: SwitchOutput, sums: TokenLosses | None, one: MicroBatch) -> None:
        """Count a micro-batch."""
        self.losses.add(sums, output.aux_loss.detach(), one.rows)
        self.sources.add(sums, one.batch)
        if self.routing:
            self.router.add(output.routing, one.inputs)

    def take_back(self) -> None:
        """Forget the step that began last."""
        for kept, sums in zip(self._before, self._sums, strict=True):
            sums.copy_(kept)

    def clear(self) -> None:
        """Forget all steps since the last reading."""
        for sums in self._sums:
            sums.zero_()

    def summary(self) -> dict[str, float]:
        """Metrics over all ranks; the meters are emptied. {} if every step was taken back."""
        totals = self.losses.totals(self.mesh)
        self.loads = self.router.loads(self.mesh)
        metrics = totals.metrics() | router_metrics(self.loads)
        metrics |= self.sources.summary(self.mesh)
        if self.distillation:
            metrics |= self.distillation.summary(self.mesh)
        return metrics if totals.rows else {}
