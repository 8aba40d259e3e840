"""What a pass may import: the base classes, the site it is given, the answer `Skip`, the error."""

from __future__ import annotations

from kroncc.errors import PassError
from kroncc.rewrite.base import Pass, Site, SitePass, Skip

__all__ = ["Pass", "PassError", "Site", "SitePass", "Skip"]
