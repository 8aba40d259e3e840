"""Targets: the small language that says which modules a pass touches.

| form | matches |
|---|---|
| `encoder.layer.0.attention.self.query` | the module of exactly that name (FQN) |
| `encoder.layer.*.output.dense` | glob: `*` within a segment, `**` any number of segments, `{a,b}` |
| `re:.*[.]dense` | a regular expression over the whole FQN |
| `type:Linear` | every module of that class name (a glob too: `type:*Norm`) |
| `@ffn.up`, `@attention.*`, `@ffn` | a role; a role's first word means all of its roles |
| `@ffn.up[0:6]`, `[::2]`, `[3]`, `[-1]` | only those layers; any form but `re:` takes it |

Pure Python: the modules come as `ModuleInfo`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from kroncc.errors import TargetError, did_you_mean, nearest
from kroncc.recipe.names import ROLES
from kroncc.recipe.schema import Scope

MAX_LENGTH = 300
"""Characters in one target; keeps patterns readable and their matching cheap."""

MAX_STARS = 8

_SLICE = re.compile(r"^(?P<body>.+?)\[(?P<slice>[^\[\]]*)\]$")
_SLICE_PARTS = re.compile(r"^\s*-?\d+\s*$|^\s*(-?\d+)?\s*:\s*(-?\d+)?\s*(:\s*(-?\d+)?\s*)?$")
_TOKENS = re.compile(r"(?<![^.])\*\*[.]|\*\*|\*|[{},]|[^*{},]+")
_PIECES = {"**.": "(?:.*[.])?", "**": ".*", "*": "[^.]*", "{": "(?:", "}": ")"}
_ROLE_CHARACTERS = re.compile(r"^[a-z*{},.]+$")
_NAME_CHARACTERS = re.compile(r"^[\w.*{},-]+$")


@dataclass(frozen=True)
class ModuleInfo:
    """What a target may ask of a module: its FQN, class name, roles (without `@`) and layer (from 0)."""

    fqn: str
    type: str
    roles: tuple[str, ...]
    layer: int | None


@dataclass(frozen=True)
class Target:
    """One parsed target. `form` is name, type, role or re; `pattern` matches whole names of that kind."""

    text: str
    form: str
    body: str
    pattern: re.Pattern[str]
    layers: slice | int | None = None

    def matches(self, module: ModuleInfo, layer_count: int) -> bool:
        """Say whether the target means `module`, in a model of `layer_count` layers."""
        if not any(self.pattern.fullmatch(name) for name in self._names(module)):
            return False
        return self.layers is None or module.layer in _chosen(self.layers, layer_count)

    def _names(self, module: ModuleInfo) -> tuple[str, ...]:
        if self.form == "role":
            return module.roles
        return (module.type,) if self.form == "type" else (module.fqn,)


def parse_target(text: str) -> Target:
    """Parse one target.

    Raises `TargetError` K201 (bad syntax), K202 (no role of that name), K203 (bad regular expression).
    """
    if not text or len(text) > MAX_LENGTH:
        raise TargetError(
            f"a target has {len(text)} characters", code="K201", expected=f"1 to {MAX_LENGTH} characters"
        )
    if text.startswith("re:"):
        return Target(text, "re", text[3:], _regex(text))
    body, layers = _split_layers(text)
    if body.startswith("@"):
        return Target(text, "role", body[1:], _role(text, body[1:]), layers)
    form = "type" if body.startswith("type:") else "name"
    body = body.removeprefix("type:")
    if not _NAME_CHARACTERS.match(body):
        raise TargetError(f"the target {text!r} is not well formed", code="K201", expected=_FORMS)
    return Target(text, form, body, _glob(body, text), layers)


_FORMS = "a module name, a glob, 're:...', 'type:Class' or a role such as '@attention.q', '@ffn.up[0:6]'"


def select(scope: Scope, modules: Sequence[ModuleInfo]) -> list[str]:
    """Return the FQNs that `scope` means, in the order of `modules`.

    Raises `TargetError` K201-K203 (see `parse_target`), K204 (a target matches nothing), K205 (an exclude
    matches nothing), K206 (`count` not met), K207 (no targets given, or everything excluded).
    """
    if not scope.targets:
        raise TargetError("the pass has no targets", code="K207", expected="targets: [...]", remedy=_FORMS)
    wanted = _union(scope.targets, modules, "K204")
    unwanted = _union(scope.exclude, modules, "K205")
    chosen = [module.fqn for module in modules if module.fqn in wanted and module.fqn not in unwanted]
    if not chosen:
        raise TargetError(
            f"exclude takes away all {len(wanted)} modules that targets {scope.targets} match",
            code="K207",
            remedy="narrow exclude",
        )
    if scope.count is not None and len(chosen) != scope.count:
        raise TargetError(
            f"targets {scope.targets} match {len(chosen)} modules: {_some(chosen)}",
            code="K206",
            expected=f"{scope.count} (count)",
            remedy=f"mend the targets, or set count to {len(chosen)}",
        )
    return chosen


def _union(texts: Sequence[str], modules: Sequence[ModuleInfo], code: str) -> set[str]:
    layer_count = max((module.layer for module in modules if module.layer is not None), default=-1) + 1
    found: set[str] = set()
    for text in texts:
        target = parse_target(text)
        hits = {module.fqn for module in modules if target.matches(module, layer_count)}
        if not hits:
            raise _no_match(target, modules, layer_count, code)
        found |= hits
    return found


def _no_match(target: Target, modules: Sequence[ModuleInfo], layers: int, code: str) -> TargetError:
    word = "exclude" if code == "K205" else "target"
    if target.layers is not None:
        anywhere = Target(target.text, target.form, target.body, target.pattern)
        at = sorted({m.layer for m in modules if anywhere.matches(m, layers) and m.layer is not None})
        if at:
            shown = ", ".join(map(str, at))
            return TargetError(
                f"the {word} {target.text!r} matches no module: no such layer",
                code=code,
                expected=f"layers among {shown}",
            )
    return TargetError(
        f"the {word} {target.text!r} matches no module",
        code=code,
        expected=_present(target, modules),
        remedy=_similar(target, modules),
    )


def _present(target: Target, modules: Sequence[ModuleInfo]) -> str:
    if target.form == "role":
        kinds = _tally(role for module in modules for role in module.roles)
        return f"a role that this model has: {kinds or 'none was found'}"
    if target.form == "type":
        return f"a type that this model has: {_tally(module.type for module in modules) or 'none'}"
    return f"one of the model's {len(modules)} modules"


def _tally(names: Iterable[str]) -> str:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))


def _similar(target: Target, modules: Sequence[ModuleInfo]) -> str:
    if target.form == "role":
        return did_you_mean(target.body, {role for module in modules for role in module.roles})
    if target.form == "type":
        return did_you_mean(target.body, {module.type for module in modules})
    names = [module.fqn for module in modules]
    close = nearest(target.body, names) or names[:3]
    return f"nearest names: {', '.join(close)}" if close else ""


def _some(names: Sequence[str], shown: int = 5) -> str:
    return ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")


def _split_layers(text: str) -> tuple[str, slice | int | None]:
    found = _SLICE.match(text)
    if not found:
        return text, None
    part = found["slice"]
    if not _SLICE_PARTS.match(part):
        raise TargetError(
            f"the layers [{part}] of target {text!r} are not well formed",
            code="K201",
            expected="[3], [-1], [0:6] or [::2]",
        )
    numbers = [int(number) if number.strip() else None for number in part.split(":")]
    if len(numbers) == 1:
        return found["body"], numbers[0]
    if numbers[2:] == [0]:
        raise TargetError(f"the step of {text!r} is 0", code="K201", expected="a step other than 0")
    return found["body"], slice(*numbers)


@lru_cache(maxsize=256)
def _layers_of(start: int | None, stop: int | None, step: int | None, count: int) -> frozenset[int]:
    return frozenset(range(count)[start:stop:step])


def _chosen(layers: slice | int, count: int) -> frozenset[int]:
    if isinstance(layers, slice):
        return _layers_of(layers.start, layers.stop, layers.step, count)
    return frozenset({layers + count if layers < 0 else layers})


def _regex(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text[3:])
    except (re.error, OverflowError, RecursionError) as cause:
        raise TargetError(
            f"{text!r} is not a regular expression: {cause}", code="K203", expected="Python's re syntax"
        ) from cause


def _role(text: str, body: str) -> re.Pattern[str]:
    if not _ROLE_CHARACTERS.match(body):
        known = did_you_mean(body, ROLES)
        raise TargetError(
            f"the role of {text!r} is not well formed", code="K202", expected="a role", remedy=known
        )
    pattern = re.compile(_glob(body, text).pattern + r"(?:[.].+)?")
    if not any(pattern.fullmatch(role) for role in ROLES):
        groups = {role.split(".")[0] for role in ROLES}
        raise TargetError(
            f"no role is called {body!r}",
            code="K202",
            expected="a role",
            remedy=did_you_mean(body, {*ROLES, *groups}),
        )
    return pattern


def _glob(body: str, text: str) -> re.Pattern[str]:
    """Translate a glob: `**` crosses dots, `*` does not, `{a,b}` is either (not nested)."""
    if body.count("*") > MAX_STARS:
        raise TargetError(f"{text!r} has too many stars", code="K201", expected=f"at most {MAX_STARS}")
    pieces, depth = [], 0
    for token in _TOKENS.findall(body):
        depth += {"{": 1, "}": -1}.get(token, 0)
        if depth not in (0, 1):
            break
        pieces.append(_piece(token, depth))
    if depth:
        raise TargetError(f"the braces of {text!r} do not match", code="K201", expected="{a,b}, not nested")
    return re.compile("".join(pieces))


def _piece(token: str, depth: int) -> str:
    if token == "," and depth:
        return "|"
    return _PIECES.get(token) or re.escape(token)
