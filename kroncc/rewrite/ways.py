"""Options that exclude each other, as the JSON Schema of a pass says it: checked without torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ConfigDict


def exactly_one(*ways: Sequence[str]) -> ConfigDict:
    """Return the `model_config` of a pass that takes exactly one of `ways`.

    A way is one option, or several of which any may be given: `exactly_one(("a", "b"), ("ratio",))`. Editors
    and `kroncc validate` read it; a validator of the pass must say the same to those who build it in Python.
    """
    return ConfigDict(json_schema_extra={"oneOf": [_way(way) for way in ways]})


def _way(way: Sequence[str]) -> dict[str, Any]:
    given = [{"required": [name], "properties": {name: {"not": {"type": "null"}}}} for name in way]
    return given[0] if len(given) == 1 else {"anyOf": given}
