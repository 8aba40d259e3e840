"""What a pass may import: the base classes, the site it is given, the answer `Skip`, the error."""

from __future__ import annotations

from kroncc.errors import PassError
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
from kroncc.rewrite.base import Calibration, Pass, Resolved, Site, SitePass, SiteStats, Skip, TreePass
from kroncc.rewrite.ways import exactly_one

__all__ = [
    "Calibration",
    "LayerStack",
    "ModelGraph",
    "Pass",
    "PassError",
    "Resolved",
    "Rewriter",
    "Site",
    "SitePass",
    "SiteStats",
    "Skip",
    "TreePass",
    "config_of",
    "exactly_one",
    "find_stacks",
    "has_cache",
    "is_causal",
    "layer_ends",
    "lenders",
    "watch_call",
]
