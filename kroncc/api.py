"""What a pass may import: the base classes, the site it is given, the answer `Skip`, the error."""

from __future__ import annotations

from kroncc.errors import PassError
from kroncc.graph.axes import Axes, Span
from kroncc.graph.layers import (
    LayerStack,
    config_of,
    find_stacks,
    has_cache,
    is_causal,
    layer_ends,
    lenders,
    watch_call,
)
from kroncc.graph.model_graph import ModelGraph
from kroncc.graph.rewriter import Rewriter
from kroncc.graph.units import Units, features, heads, neurons, streams
from kroncc.rewrite.base import Calibration, Pass, Resolved, Site, SitePass, SiteStats, Skip, TreePass
from kroncc.rewrite.cut import Cut, Narrowed, apply_cuts, keep_units, narrowed
from kroncc.rewrite.narrow import Group, narrow
from kroncc.rewrite.ways import exactly_one

__all__ = [
    "Axes",
    "Calibration",
    "Cut",
    "Group",
    "LayerStack",
    "ModelGraph",
    "Narrowed",
    "Pass",
    "PassError",
    "Resolved",
    "Rewriter",
    "Site",
    "SitePass",
    "SiteStats",
    "Skip",
    "Span",
    "TreePass",
    "Units",
    "apply_cuts",
    "config_of",
    "exactly_one",
    "features",
    "find_stacks",
    "has_cache",
    "heads",
    "is_causal",
    "keep_units",
    "layer_ends",
    "lenders",
    "narrow",
    "narrowed",
    "neurons",
    "streams",
    "watch_call",
]
