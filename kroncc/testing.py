"""Checks for the tests of a pass, also of one in another package.

Each raises `AssertionError` with what differs; each runs the pass as kroncc itself does.
"""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kroncc.graph.capture import capture
from kroncc.model.save import save_model
from kroncc.recipe.schema import PassCall, Scope
from kroncc.rewrite.base import Site, SitePass, Skip
from kroncc.rewrite.pipeline import compress_graph
from kroncc.rewrite.treat import Treated, treat

__all__ = ["assert_lossless", "assert_reloads", "assert_rewrites", "assert_skips", "example_input"]


def example_input(module: nn.Module) -> torch.Tensor:
    """Return a random input for `module`: ids [2, 5] for an embedding, floats [2, 5, in] for a linear map."""
    if isinstance(module, nn.Embedding):
        return torch.randint(module.num_embeddings, (2, 5))
    if isinstance(module, nn.Linear):
        return torch.randn(2, 5, module.in_features, dtype=module.weight.dtype)
    if isinstance(module, Conv1D):
        return torch.randn(2, 5, module.weight.shape[0], dtype=module.weight.dtype)
    raise TypeError(f"no example input for a {type(module).__name__}; give `x`")


def assert_rewrites(pass_: SitePass, module: nn.Module, x: torch.Tensor | None = None) -> nn.Module:
    """Check that `pass_` rewrites `module` and keeps its promises; return the new module.

    The promises: on meta tensors it gives the same parameter names, shapes and types; the output has the same
    shape; gradients reach every parameter; the module it was given stays as it was.
    """
    before = copy.deepcopy(module.state_dict())
    done = _treated(pass_, module)
    new = done.module
    plan = pass_ if pass_.settled() else done.options  # what is written, and replayed on loading
    planned = _treated(plan, copy.deepcopy(module).to("meta")).module
    real, meta = _layout(new), _layout(planned)
    assert real == meta, f"planned on meta: {meta}\nbuilt on real weights: {real}"
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), f"the pass changed {name} of the module it was given"
    x = example_input(module) if x is None else x
    want, got = module(x).shape, new(x).shape
    assert want == got, f"output shape {tuple(got)}, expected {tuple(want)}"
    if x.is_floating_point():
        x = x.detach().clone().requires_grad_()
    y = new(x)
    if y.requires_grad:  # a table of frozen numbers has no gradient
        y.float().square().sum().backward()
    assert not x.is_floating_point() or x.grad is not None, "no gradient reaches the input"
    idle = [name for name, p in new.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle, f"no gradient reaches {', '.join(idle)}"
    return new


def assert_lossless(
    pass_: SitePass, module: nn.Module, x: torch.Tensor | None = None, *, tolerance: float = 1e-5
) -> nn.Module:
    """Check that the rewritten module computes what `module` does, to `tolerance` of the largest output."""
    new = assert_rewrites(pass_, module, x)
    x = example_input(module) if x is None else x
    with torch.no_grad():
        want, got = module(x), new(x)
    error = ((got - want).abs().max() / want.abs().max()).item()
    assert error <= tolerance, f"relative error {error:.2e}, allowed {tolerance:.0e}"
    return new


def assert_skips(pass_: SitePass, module: nn.Module, match: str = "") -> str:
    """Check that `pass_` leaves `module` alone for a reason that matches the pattern `match`; return it."""
    outcome = treat(pass_, Site("module", module), {})
    assert isinstance(outcome, Skip), f"rewritten to {outcome.module}, expected a skip"
    assert re.search(match, outcome.reason), f"reason {outcome.reason!r} does not match {match!r}"
    return outcome.reason


def assert_reloads(
    name: str, options: Mapping[str, Any], targets: list[str], model: PreTrainedModel
) -> PreTrainedModel:
    """Check that `model`, with the installed pass `name` on `targets`, saves and loads with equal outputs.

    `model` is rewritten in place; the loaded one is returned.
    """
    graph = capture(model.eval())
    call = PassCall(name=name, scope=Scope(targets=targets), options=dict(options))
    done = compress_graph(graph, [call])
    assert done.structure.passes, f"nothing was rewritten: {done.skipped}"
    ids = torch.randint(model.config.vocab_size, (2, 7))
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder) / "model", done.structure)
        loaded = type(model).from_pretrained(Path(folder) / "model", dtype=model.dtype).eval()
    with torch.no_grad():
        want, got = model(ids)[0], loaded(ids)[0]
    assert torch.equal(want, got), f"outputs differ by up to {(want - got).abs().max().item():.2e}"
    assert isinstance(loaded, PreTrainedModel)
    return loaded


def _treated(pass_: SitePass, module: nn.Module) -> Treated:
    outcome = treat(pass_, Site("module", module), {})
    assert not isinstance(outcome, Skip), f"skipped: {outcome.reason}"
    return outcome


def _layout(module: nn.Module) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(value.shape), value.dtype) for name, value in module.state_dict().items()}
