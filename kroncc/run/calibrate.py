"""Measure a model on calibration rows: what flows into its modules, and what their weights do to the loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kroncc.errors import DataError, RunError
from kroncc.rewrite.base import Calibration, SiteStats
from kroncc.run.evaluate import run_model
from kroncc.run.example_losses import Draws, example_losses
from kroncc.run.meters import Fisher, Influence, Lookups, Moments, Products, Rows, Saliency, has_fisher
from kroncc.run.steps import Batch


def collect(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    requests: Mapping[str, Calibration],
    *,
    task: str,
    device: torch.device | str,
    seed: int = 0,
) -> dict[str, SiteStats]:
    """Return what `requests` ask for, by FQN of a module; one pass over `batches`.

    The model is moved to `device` and put in eval mode; its weights are only read. Positions of padding are
    left out wherever a module takes [rows, length, ...] or [rows * length, width]. A module that is called
    several times in a pass (shared layers) is measured over all its calls. `moments` of a module that takes
    ids are its `lookups`. `sequential` is no concern of this function: it measures the model as it is.

    `fisher` and `saliency` come from one backward pass a batch, of the sum of the losses of its examples
    (`example_losses` says which: with labels where the batch has them and the model a head, else with labels
    drawn from its predictions, else of a random projection of the sentence embedding). Gradients of single
    examples are formed from what goes in and comes back at the module. Where a module's input has no
    dimension of examples (position tables), the model runs on one row at a time. `fisher` is None for modules
    that are no Linear, Conv1D or Embedding; a tied weight has the gradient of all its uses.

    Products are formed in float32 on the device, totals are kept in float64. The same rows, in the same
    batches, and the same `seed` give the same numbers; other batches change rounding only.
    Raises DataError K605 without rows, RunError K830 (not finite), K831 (no loss), PassError K418.
    """
    model.to(device).eval()
    draws, examples, single = Draws(seed), 0, False
    gradients = any(request.fisher or request.saliency for request in requests.values())
    with _Probes(model, requests) as probes, _frozen(model) if gradients else nullcontext():
        for batch in batches:
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            if gradients and not examples:
                single = not probes.by_example(batch)
            for part in _singles(batch) if single else (batch,):
                examples += _rows(part)
                probes.measure(part, task, draws if gradients else None)
    if not examples:
        raise DataError("there are no rows to calibrate on", code="K605")
    return probes.results(examples)


class _Probes:
    """The meters of all sites, hooked into the model as long as the context is open."""

    def __init__(self, model: PreTrainedModel, requests: Mapping[str, Calibration]) -> None:
        self.model = model
        self.products = Products()
        self.rows = Rows(0)
        self.running = False
        self.weights: dict[int, Fisher] = {}
        self.sites = {
            fqn: _Site(self, fqn, model.get_submodule(fqn), request) for fqn, request in requests.items()
        }
        self._open = ExitStack()

    def __enter__(self) -> _Probes:
        for site in self.sites.values():
            self._hook(site.module, site.before, site.after)
        for module in self.model.modules():
            fisher = self.weights.get(id(module._parameters.get("weight")))
            if fisher is not None and has_fisher(module):
                self._hook(module, None, _weigher(self, fisher))
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def measure(self, batch: Batch, task: str, draws: Draws | None) -> None:
        """Run the model on a batch, and back where gradients are asked for; the meters take what they see."""
        mask = batch.get("attention_mask")
        self.rows, self.running = Rows(_rows(batch), None if mask is None else mask != 0), True
        with torch.set_grad_enabled(draws is not None):
            outputs = run_model(self.model, batch)
        self.products.clear()
        if draws is not None:
            draws.next(self.rows.count)
            loss = example_losses(outputs, batch, task, draws).sum()
            if loss.requires_grad:  # a loss that no site can change has gradient zero
                loss.backward()  # type: ignore[no-untyped-call]
        for fisher in self.weights.values():
            fisher.flush()
        for site in self.sites.values():
            if site.saliency is not None:
                site.saliency.flush()
        self.running = False

    @torch.no_grad()
    def by_example(self, batch: Batch) -> bool:
        """Say whether every module that gradients are asked of has its examples along the first dimension."""
        if _rows(batch) == 1:
            return True
        watched = [site.module for site in self.sites.values() if site.request.saliency]
        watched += [m for m in self.model.modules() if id(m._parameters.get("weight")) in self.weights]
        one, two = (
            _lengths(self.model, watched, {name: value[:count] for name, value in batch.items()})
            for count in (1, 2)
        )
        return [2 * length for length in one] == two

    def results(self, examples: int) -> dict[str, SiteStats]:
        """Return what every site has measured; K830 for what is not finite."""
        return {fqn: site.result(examples) for fqn, site in self.sites.items()}

    def _hook(self, module: nn.Module, before: Any, after: Any) -> None:
        if before is not None:
            self._open.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        self._open.callback(module.register_forward_hook(after, with_kwargs=True).remove)


class _Site:
    """The meters of one site."""

    def __init__(self, probes: _Probes, fqn: str, module: nn.Module, request: Calibration) -> None:
        self.probes, self.fqn, self.module, self.request = probes, fqn, module, request
        self.moments, self.influence = Moments(), Influence()
        self.lookups = Lookups(getattr(module, "num_embeddings", 0))
        self.saliency = Saliency(fqn, request.saliency) if request.saliency else None
        self.fisher: Fisher | None = None
        if request.fisher and has_fisher(module):
            weight = module.get_parameter("weight")
            fresh = Fisher(weight, transposed=not isinstance(module, nn.Linear | nn.Embedding))
            self.fisher = probes.weights.setdefault(id(weight), fresh)

    def before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Take the input of a call; give it a gradient of its own where `saliency` is asked for."""
        x = _first(args, kwargs)
        if x is None or not self.probes.running:
            return None
        if self.request.moments:
            if x.is_floating_point():
                self.moments.add(x, self.probes.rows, self.probes.products)
            else:
                self.lookups.add(x, self.probes.rows)
        if self.saliency is None or not x.is_floating_point():
            return None
        mine = self.saliency.watch(x, self.probes.rows)
        return tuple(mine if one is x else one for one in args), {
            name: mine if one is x else one for name, one in kwargs.items()
        }

    def after(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Compare output and input of a call."""
        x, y = _first(args, kwargs), _tensor(output)
        if self.probes.running and self.request.influence and x is not None and y is not None:
            self.influence.add(x, y, self.probes.rows)

    def result(self, examples: int) -> SiteStats:
        """Return what was measured."""
        stats = SiteStats(
            count=self.moments.count or self.lookups.count or self.influence.count,
            mean=self.moments.sum.mean(self.moments.count),
            moment=self.moments.square.mean(self.moments.count),
            lookups=self.lookups.found.mean(1),
            fisher=self.fisher.total.mean(examples) if self.fisher else None,
            saliency={
                size: total
                for size, sums in (self.saliency.totals if self.saliency else {}).items()
                if (total := sums.mean(examples)) is not None
            },
            influence=self.influence.mean(),
        )
        _check_finite(self.fqn, stats)
        return stats


def _weigher(probes: _Probes, fisher: Fisher) -> Any:
    """Return the hook that shows one module's calls to the meter of its weight."""

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        x = _first(args, kwargs)
        if not probes.running or x is None or not isinstance(output, Tensor):
            return None
        return fisher.watch(module, x, output, probes.rows)

    return after


def _lengths(model: PreTrainedModel, watched: list[nn.Module], batch: Batch) -> list[int]:
    """Return the first dimension of the input of every call of the watched modules, in order."""
    lengths: list[int] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = _first(args, kwargs)
        lengths.append(len(x) if x is not None else 0)

    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in dict.fromkeys(watched)]
    try:
        run_model(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return lengths


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Keep the parameters out of the backward pass: their gradients are formed an example at a time."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _rows(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _singles(batch: Batch) -> Iterator[Batch]:
    for row in range(_rows(batch)):
        yield {name: tensor[row : row + 1] for name, tensor in batch.items()}


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the first tensor that a module is called with."""
    return _tensor((*args, *kwargs.values()))


def _tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    given = value if isinstance(value, tuple | list) else ()
    return next((one for one in given if isinstance(one, Tensor)), None)


def _check_finite(fqn: str, stats: SiteStats) -> None:
    """Raise K830 where what was measured is infinite or no number."""
    tensors = {"moment": stats.moment, "fisher": stats.fisher}
    tensors |= {f"saliency of groups of {size}": values for size, values in stats.saliency.items()}
    for name, tensor in tensors.items():
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise RunError(
                f"calibration of {fqn}: its {name} is not finite",
                code="K830",
                expected="a model whose values and gradients are finite on the calibration rows",
                remedy="check the model, and the calibration rows",
            )
