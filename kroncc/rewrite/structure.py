"""The structure: which passes, with which resolved options, on which modules. Stored in `config.json`."""

from __future__ import annotations

from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

STRUCTURE_VERSION: Final = 1


class AppliedPass(BaseModel):
    """One pass with every option explicit, and the modules (FQN) it was applied to."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    name: str = Field(alias="pass")
    version: int
    options: dict[str, Any]
    sites: tuple[str, ...]


class Structure(BaseModel):
    """All passes of a model in order; replayed on the dense model they rebuild the compressed one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = STRUCTURE_VERSION
    passes: tuple[AppliedPass, ...] = ()

    def __add__(self, other: Structure) -> Structure:
        return Structure(passes=self.passes + other.passes)
