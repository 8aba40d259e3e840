"""The three things a module may do while it trains, whoever wrote it.

`set_progress(p)` is called before every optimiser step with the share of the stage that is done (0 to 1),
`penalty()` returns a scalar that is added to the loss, `finalise()` returns the module that takes its place
when training ends.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from kroncc.model.replay import set_module
from kroncc.rewrite.during import Installed, settled_structure
from kroncc.rewrite.structure import Structure


def set_progress(root: nn.Module, progress: float) -> None:
    """Tell every module of `root` that wants to know how far training is."""
    for module in _having(root, "set_progress"):
        module.set_progress(progress)  # type: ignore[operator]


def penalty(root: nn.Module) -> torch.Tensor | None:
    """Return the sum of all penalties, a scalar, or None where no module has one."""
    terms = [module.penalty() for module in _having(root, "penalty")]  # type: ignore[operator]
    return torch.stack([term.float().reshape(()) for term in terms]).sum() if terms else None


@torch.no_grad()
def finalise(root: nn.Module) -> dict[str, nn.Module]:
    """Replace every module of `root` that has `finalise`, at all its places; return FQN -> new module.

    Modules inside a replaced one are the concern of that one.
    """
    made: dict[int, nn.Module] = {}
    replaced: dict[str, nn.Module] = {}
    for fqn, module in list(root.named_modules(remove_duplicate=False)):
        inside = any(fqn.startswith(f"{outer}.") for outer in replaced)
        if not fqn or inside or not callable(getattr(module, "finalise", None)):
            continue
        if id(module) not in made:
            made[id(module)] = module.finalise()
        parent, _, name = fqn.rpartition(".")
        setattr(root.get_submodule(parent), name, made[id(module)])
        replaced[fqn] = made[id(module)]
    return replaced


def _having(root: nn.Module, method: str) -> Iterator[nn.Module]:
    return (module for module in root.modules() if callable(getattr(module, method, None)))


def settle(model: nn.Module, installed: Installed) -> Structure:
    """End what passes under `during` began: tie again what was tied, let a tree pass change the tree.

    Returns what the passes add to the model's structure.
    `model` has its final modules at the sites; those tied to them follow.
    """
    for fqn, partners in installed.partners.items():
        tied_to = model.get_submodule(fqn).tied_to
        for name, partner in partners.items():
            set_module(model, name, tied_to(partner))  # type: ignore[operator]
    structure = settled_structure(installed.structure, model)
    if installed.tree is not None:
        tree = installed.tree
        tree.options.end(model, tree.sites, tree.choice)
    return structure
