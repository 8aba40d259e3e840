"""Check what a recipe says as a whole: names, the graph of its steps, targets, taps, expectations.

What counts as unused: a data set that no step names; and a `compress`, `finetune` or `distill` step whose
model no other step and no expectation names - except the last of them in the file (with the other copies of
its `for_each`), which is the recipe's result. `evaluate` and `export` are results in themselves.

Names are checked on the steps as written, so that a wrong type in a step does not hide a wrong name in it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from kroncc.errors import KronccError, did_you_mean
from kroncc.recipe import names
from kroncc.recipe.build import Draft
from kroncc.recipe.expect import Expectation, parse_expectation
from kroncc.recipe.node import Path
from kroncc.recipe.targets import parse_target

MAKERS = ("compress", "finetune", "distill", "reconstruct", "export")
MODEL_KEYS = ("model", "student", "teacher", "models", "against")
Body = Mapping[str, Any]


def check(draft: Draft, templates: Mapping[str, str]) -> None:
    """Add to `draft` every problem of names and of the graph (K15x-K17x, K2xx, and K6xx of data sources).

    `templates` gives the step as written that each step was copied from.
    """
    if draft.model is not None and draft.model.task is not None:
        _known(draft, "K157", "task", draft.model.task, names.TASKS, ("model", "task"))
    for name, spec in draft.data.items():
        _check_source(draft, name, spec.source, spec.files is not None)
        if not 1 <= len(spec.text) <= 2:
            message = f"data {name!r} names {len(spec.text)} text columns"
            draft.note("K609", ("data", name, "text"), message, "one, or two for pairs")
    for name, (kind, body) in draft.bodies.items():
        path = ("steps", name, kind)
        _check_inputs(draft, name, body, path)
        _check_targets(draft, body, path)
        _check_losses(draft, body, path)
        _check_metrics(draft, body, path)
    if names.BASE in draft.written_steps:
        message, expected = "no step may be called 'base': it is the model as it came", "another name"
        draft.note("K166", ("steps", names.BASE), message, expected, at_key=True)
    expectations = _expectations(draft)
    _check_cycles(draft)
    _check_unused(draft, templates, expectations)


def _is_readable(draft: Draft) -> bool:
    """Say whether every step could be read; if not, the one that cannot may be the one that uses a name."""
    return len(draft.bodies) == len(draft.written_steps)


def _texts(body: Body, key: str) -> Iterator[tuple[str, Path]]:
    """Yield the texts at a key, each with its path; what is no text was reported by the check of shapes."""
    value = body.get(key)
    if isinstance(value, str):
        yield value, (key,)
    elif isinstance(value, list):
        yield from ((one, (key, index)) for index, one in enumerate(value) if isinstance(one, str))


def _inputs(body: Body) -> list[str]:
    return list(dict.fromkeys(model for key in MODEL_KEYS for model, _ in _texts(body, key)))


def _entries(body: Body, key: str) -> Iterator[tuple[str, Body, Path]]:
    """Yield name, options and path of each `- NAME: {...}` at a key."""
    listed = body.get(key)
    for index, entry in enumerate(listed if isinstance(listed, list) else ()):
        for name, options in entry.items() if isinstance(entry, dict) else ():
            if isinstance(options, dict):
                yield name, options, (key, index, name)


def _data(body: Body) -> Iterator[tuple[str, Path]]:
    """Yield the data sets that a step names, its own and that of `calibrate`, each with its path."""
    if isinstance(body.get("data"), str):
        yield body["data"], ("data",)
    calibrate = body.get("calibrate")
    if isinstance(calibrate, dict) and isinstance(calibrate.get("data"), str):
        yield calibrate["data"], ("calibrate", "data")


def _makers(draft: Draft) -> list[str]:
    """Return the names of the steps that make a model, or may make one."""
    return [name for name in draft.written_steps if draft.bodies.get(name, ("distill",))[0] in MAKERS]


def _known(
    draft: Draft, code: str, what: str, name: str, valid: Iterable[str], path: Path, at_key: bool = False
) -> bool:
    """Say whether a name is known; note it if not. A name with a variable left in it was noted before."""
    pool = list(valid)
    if name in pool:
        return True
    if "${" in name:
        return False
    expected = f"a known {what}" if pool else f"there is no {what}"
    draft.note(code, path, f"no {what} is called {name!r}", expected, did_you_mean(name, pool), at_key)
    return False


def _check_source(draft: Draft, name: str, source: str, has_files: bool) -> None:
    path = ("data", name, "source")
    if source.startswith("builtin:"):
        _known(draft, "K615", "built-in source", source, names.BUILTIN_SOURCES, path)
    elif source in names.FILE_SOURCES and not has_files:
        message = f"data {name!r} of source {source!r} names no files"
        draft.note("K601", ("data", name), message, "files: [...]")
    elif source not in names.FILE_SOURCES and has_files:
        remedy = did_you_mean(source, names.FILE_SOURCES)
        expected = ", ".join(names.FILE_SOURCES)
        draft.note("K616", path, f"the source {source!r} takes no files", expected, remedy)


def _check_inputs(draft: Draft, name: str, body: Body, path: Path) -> None:
    """Check the models and the data that a step names."""
    for model, below in (found for key in MODEL_KEYS for found in _texts(body, key)):
        where = path + below
        kind = draft.bodies.get(model, ("", {}))[0]
        if model == names.BASE:
            continue
        if model == name:
            draft.note("K163", where, f"step {name!r} takes itself", "base or another step")
        elif kind and kind not in MAKERS:
            message = f"{model!r} is an {kind} step and makes no model"
            draft.note("K161", where, message, "base or a step that makes a model")
        else:
            _known(draft, "K160", "step", model, [names.BASE, *_makers(draft)], where)
    for data, below in _data(body):
        _known(draft, "K164", "data set", data, draft.written_data, (*path, *below))


def _check_targets(draft: Draft, body: Body, path: Path) -> None:
    for key in ("freeze", "copy_from_teacher"):
        for text, below in _texts(body, key):
            _collect(draft, partial(parse_target, text), path + below)
    for _, options, where in (*_entries(body, "passes"), *_entries(body, "during")):
        for text, below in (found for key in ("targets", "exclude") for found in _texts(options, key)):
            _collect(draft, partial(parse_target, text), path + where + below)


def _collect(draft: Draft, attempt: Callable[[], object], path: Path) -> object | None:
    try:
        return attempt()
    except KronccError as error:
        for problem in error.problems:
            draft.note(problem.code, path, problem.message, problem.expected, problem.remedy)
        return None


def _check_losses(draft: Draft, body: Body, path: Path) -> None:
    """Refuse a tap that is no known word but resembles one; anything else may be the name of a module."""
    for _, options, where in _entries(body, "losses"):
        tap = options.get("at")
        if not isinstance(tap, str) or tap in names.TAPS:
            continue
        resembles = difflib.get_close_matches(tap, names.TAPS, n=1, cutoff=0.75)
        if not tap or tap.split(".")[0] in ("ffn", "attention") or (resembles and "." not in tap):
            expected = f"{', '.join(names.TAPS)}, or the name of a module"
            remedy = did_you_mean(tap, names.TAPS)
            draft.note("K152", (*path, *where, "at"), f"no tap is called {tap!r}", expected, remedy)


def _check_metrics(draft: Draft, body: Body, path: Path) -> None:
    metrics = list(_texts(body, "metrics"))
    for metric, below in metrics:
        _known(draft, "K155", "metric", metric, names.METRICS, path + below)
    if any(metric == "fidelity" for metric, _ in metrics) and "against" not in body:
        message, remedy = "fidelity needs a model to compare with", "add against: MODEL, e.g. against: base"
        draft.note("K156", path, message, "the key 'against'", remedy)


def _expectations(draft: Draft) -> list[Expectation]:
    found = []
    for key, text in draft.expect.items():
        parsed = _collect(draft, partial(parse_expectation, key, text), ("expect", key))
        if isinstance(parsed, Expectation):
            found.append(parsed)
            for name in sorted(parsed.names()):
                _check_result(draft, name, ("expect", key))
    return found


def _check_result(draft: Draft, name: str, path: Path) -> None:
    """Check one `STEP.attribute`: the step makes a model, and the attribute is known or measured, once."""
    model, _, attribute = name.partition(".")
    at_key = name == path[-1]
    if not _known(draft, "K172", "step", model, [names.BASE, *_makers(draft)], path, at_key):
        return
    parts = [f"fidelity.{part}" for part in names.FIDELITY_PARTS]
    plain = [metric for metric in names.METRICS if metric != "fidelity"]
    if not _known(draft, "K173", "result", attribute, [*names.COSTS, *plain, *parts], path, at_key):
        return
    metric = attribute.split(".")[0]
    if attribute in names.COSTS:
        return
    steps = [name for name, (_, body) in draft.bodies.items() if _measures(body, model, metric)]
    if not steps and _is_readable(draft):
        remedy = f"add an evaluate step with models: [{model}], metrics: [{metric}]"
        draft.note(
            "K174", path, f"no step measures {metric} of {model!r}", "a measured result", remedy, at_key
        )
    if len(steps) > 1:
        message = f"{metric} of {model!r} is measured by {', '.join(steps)}"
        draft.note("K175", path, message, "one step that measures it", at_key=at_key)


def _measures(body: Body, model: str, metric: str) -> bool:
    return model in dict(_texts(body, "models")) and metric in dict(_texts(body, "metrics"))


def _check_cycles(draft: Draft) -> None:
    """Report each circle of steps once, written out."""
    needs = {
        name: [one for one in _inputs(body) if one in draft.bodies and one not in (name, names.BASE)]
        for name, (_, body) in draft.bodies.items()
    }
    done: set[str] = set()
    for start in needs:
        cycle = _find_cycle(start, needs, done)
        if cycle:
            shown = cycle if len(cycle) <= 12 else [*cycle[:9], "...", *cycle[-2:]]
            message = f"the steps go in a circle: {' -> '.join(shown)}"
            draft.note("K162", ("steps", cycle[0]), message, "steps that begin at base", at_key=True)


def _find_cycle(start: str, needs: Mapping[str, Sequence[str]], done: set[str]) -> list[str]:
    """Walk from `start` in depth, without recursion; return the first circle met."""
    trail: list[str] = []
    stack = [(start, False)]
    while stack:
        name, leaving = stack.pop()
        if leaving:
            trail.pop()
            done.add(name)
        elif name in trail:
            done.update(trail)
            return [*trail[trail.index(name) :], name]
        elif name not in done:
            trail.append(name)
            stack.append((name, True))
            stack += [(need, False) for need in reversed(needs[name])]
    return []


def _check_unused(draft: Draft, templates: Mapping[str, str], expectations: Sequence[Expectation]) -> None:
    """Look for what nothing uses; a misspelt name or an unreadable step may be the use that is missing."""
    known = {problem.code for problem in draft.problems}
    if not _is_readable(draft):
        return
    used = {model for _, body in draft.bodies.values() for model in _inputs(body)}
    used |= {name.partition(".")[0] for expectation in expectations for name in expectation.names()}
    makers = _makers(draft)
    last = templates.get(makers[-1]) if makers else None
    for name in makers if not known & {"K160", "K172"} else ():
        if draft.bodies[name][0] == "export":
            continue
        if name not in used and templates.get(name) != last:
            message, remedy = (
                f"nothing uses step {name!r}",
                "use, evaluate or export its model, or remove the step",
            )
            draft.note("K165", ("steps", name), message, "steps that lead to a result", remedy, at_key=True)
    data = {data for _, body in draft.bodies.values() for data, _ in _data(body)}
    for name in draft.written_data if "K164" not in known else ():
        if name not in data:
            message = f"no step uses data {name!r}"
            draft.note("K167", ("data", name), message, "data that a step names", "remove it", at_key=True)
