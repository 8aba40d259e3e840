"""Checks of a distillation that need shapes but no weights: taps exist, layers pair up, widths and heads fit."""

from __future__ import annotations

from kroncc.errors import PlanError
from kroncc.graph.model_graph import ModelGraph
from kroncc.graph.roles import module_infos
from kroncc.graph.taps import tap_shapes
from kroncc.recipe.schema import Distill, LossSpec, Scope
from kroncc.recipe.targets import select
