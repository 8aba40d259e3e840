"""Check what a recipe says as a whole: names, the graph of its steps, targets, taps, expectations.

What counts as unused: a data set that no step names; and a `compress`, `finetune` or `distill` step whose
model no other step and no expectation names - except the last of them in the file (with the other copies of
its `for_each`), which is the recipe's result. `evaluate` and `export` are results in themselves.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

from kroncc.errors import KronccError, did_you_mean
from kroncc.recipe import names
from kroncc.recipe.build import Draft
from kroncc.recipe.expect import Expectation, parse_expectation
from kroncc.recipe.node import Path
from kroncc.recipe.schema import Action, Compress, Distill, Evaluate, Export, Finetune, Training, inputs_of
from kroncc.recipe.targets import parse_target


def check(draft: Draft, templates: Mapping[str, str]) -> None:
    """Add to `draft` every problem of names and of the graph (K15x-K17x, K2xx, and K6xx of data sources).

    `templates` gives the step as written that each step was copied from.
    """
    if draft.model is not None and draft.model.task is not None:
        _known(draft, "K157", "task", draft.model.task, names.TASKS, ("model", "task"))
    for name, spec in draft.data.items():
        _check_source(draft, name, spec.source, spec.files is not None)
    for name, action in draft.steps.items():
        path = ("steps", name, type(action).__name__.lower())
        _check_inputs(draft, name, action, path)
        _check_words(draft, action, path)
    if names.BASE in draft.written_steps:
        draft.note(
            "K166",
            ("steps", names.BASE),
            "no step may be called 'base'",
            "a name other than base",
            at_key=True,
        )
    expectations = _expectations(draft)
    _check_cycles(draft)
    if len(draft.steps) == len(draft.written_steps):  # else a faulty step may be the one that uses it
        _check_unused(draft, templates, expectations)


def _known(draft: Draft, code: str, what: str, name: str, valid: Iterable[str], path: Path) -> bool:
    pool = list(valid)
    if name in pool:
        return True
    remedy = did_you_mean(name, pool)
    draft.note(
        code,
        path,
        f"no {what} is called {name!r}",
        f"a known {what}" if pool else f"no {what} is there",
        remedy,
    )
    return False


def _check_source(draft: Draft, name: str, source: str, has_files: bool) -> None:
    path = ("data", name, "source")
    if source.startswith("builtin:"):
        _known(draft, "K615", "built-in source", source, names.BUILTIN_SOURCES, path)
    elif source in names.FILE_SOURCES and not has_files:
        draft.note(
            "K601", ("data", name), f"data {name!r} of source {source!r} names no files", "files: [...]"
        )
    elif source not in names.FILE_SOURCES and has_files:
        remedy = did_you_mean(source, names.FILE_SOURCES)
        draft.note(
            "K616", path, f"the source {source!r} takes no files", ", ".join(names.FILE_SOURCES), remedy
        )


def _check_inputs(draft: Draft, name: str, action: Action, path: Path) -> None:
    """Check the models and the data that a step names."""
    for model, where in _model_paths(action, path):
        if model == name:
            draft.note("K163", where, f"step {name!r} takes itself", "base or another step")
            continue
        silent = draft.steps.get(model)
        if isinstance(silent, Evaluate | Export):
            kind = type(silent).__name__.lower()
            draft.note(
                "K161",
                where,
                f"{model!r} is an {kind} step and makes no model",
                "base or a step that makes a model",
            )
            continue
        makers = [
            one for one in draft.written_steps if not isinstance(draft.steps.get(one), Evaluate | Export)
        ]
        _known(draft, "K160", "step", model, [names.BASE, *makers], where)
    if isinstance(action, Training | Evaluate):
        _known(draft, "K164", "data set", action.data, draft.written_data, (*path, "data"))


def _model_paths(action: Action, path: Path) -> Iterator[tuple[str, Path]]:
    match action:
        case Distill():
            yield action.student, (*path, "student")
            yield action.teacher, (*path, "teacher")
        case Evaluate():
            for index, model in enumerate(action.models):
                yield model, (*path, "models", index)
            if action.against is not None:
                yield action.against, (*path, "against")
        case Compress() | Finetune() | Export():
            yield action.model, (*path, "model")


def _check_words(draft: Draft, action: Action, path: Path) -> None:
    """Check targets, taps and metrics, as far as words can be checked without the model."""
    if isinstance(action, Compress):
        for index, call in enumerate(action.passes):
            where = (*path, "passes", index, call.name)
            _check_targets(draft, call.scope.targets, (*where, "targets"))
            _check_targets(draft, call.scope.exclude, (*where, "exclude"))
    if isinstance(action, Training):
        _check_targets(draft, action.freeze, (*path, "freeze"))
    if isinstance(action, Distill):
        _check_targets(draft, action.copy_from_teacher, (*path, "copy_from_teacher"))
        for index, loss in enumerate(action.losses):
            _check_tap(draft, loss.at, (*path, "losses", index, loss.kind, "at"))
    if isinstance(action, Evaluate):
        for index, metric in enumerate(action.metrics):
            _known(draft, "K155", "metric", metric, names.METRICS, (*path, "metrics", index))
        if "fidelity" in action.metrics and action.against is None:
            remedy = "add against: the model to compare with, e.g. base"
            draft.note("K156", path, "fidelity needs a model to compare with", "against: MODEL", remedy)


def _check_targets(draft: Draft, targets: Sequence[str], path: Path) -> None:
    for index, text in enumerate(targets):
        _collect(draft, partial(parse_target, text), (*path, index))


def _collect(draft: Draft, attempt: Callable[[], object], path: Path) -> object | None:
    try:
        return attempt()
    except KronccError as error:
        for problem in error.problems:
            draft.note(problem.code, path, problem.message, problem.expected, problem.remedy)
        return None


def _check_tap(draft: Draft, tap: str, path: Path) -> None:
    """Refuse a tap that is no known word but resembles one; anything else may be the name of a module."""
    if tap in names.TAPS:
        return
    resembles = difflib.get_close_matches(tap, names.TAPS, n=1, cutoff=0.75)
    if not tap or tap.split(".")[0] in ("ffn", "attention") or (resembles and "." not in tap):
        expected = f"{', '.join(names.TAPS)}, or the name of a module"
        draft.note("K152", path, f"no tap is called {tap!r}", expected, did_you_mean(tap, names.TAPS))


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
    makers = [one for one in draft.written_steps if not isinstance(draft.steps.get(one), Evaluate | Export)]
    if not _known(draft, "K172", "step", model, [names.BASE, *makers], path) or attribute in names.COSTS:
        return
    parts = [f"fidelity.{part}" for part in names.FIDELITY_PARTS]
    plain = [metric for metric in names.METRICS if metric != "fidelity"]
    if not _known(draft, "K173", "result", attribute, [*names.COSTS, *plain, *parts], path):
        return
    metric = attribute.split(".")[0]
    steps = [
        step
        for step, action in draft.steps.items()
        if isinstance(action, Evaluate) and model in action.models and metric in action.metrics
    ]
    if not steps and len(draft.steps) == len(draft.written_steps):
        remedy = f"add an evaluate step with models: [{model}], metrics: [{metric}]"
        draft.note("K174", path, f"no step measures {metric} of {model!r}", "a measured result", remedy)
    if len(steps) > 1:
        draft.note(
            "K175",
            path,
            f"{metric} of {model!r} is measured by {', '.join(steps)}",
            "one step that measures it",
        )


def _check_cycles(draft: Draft) -> None:
    """Report each cycle of steps once, written out."""
    needs = {
        name: [one for one in dict.fromkeys(inputs_of(action)) if one in draft.steps and one != name]
        for name, action in draft.steps.items()
    }
    done: set[str] = set()
    for start in needs:
        cycle = _find_cycle(start, needs, done)
        if cycle:
            shown = " -> ".join(cycle)
            draft.note(
                "K162",
                ("steps", cycle[0]),
                f"the steps go in a circle: {shown}",
                "steps that end",
                at_key=True,
            )


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
    used = {model for action in draft.steps.values() for model in inputs_of(action)}
    used |= {name.partition(".")[0] for expectation in expectations for name in expectation.names()}
    makers = [name for name, action in draft.steps.items() if not isinstance(action, Evaluate | Export)]
    last = templates.get(makers[-1]) if makers else None
    for name in makers:
        if name not in used and templates.get(name) != last:
            remedy = "use its model in a later step, evaluate or export it, or remove the step"
            draft.note(
                "K165",
                ("steps", name),
                f"nothing uses step {name!r}",
                "steps that lead to a result",
                remedy,
                at_key=True,
            )
    data = {action.data for action in draft.steps.values() if isinstance(action, Training | Evaluate)}
    for name in draft.written_data:
        if name not in data:
            draft.note(
                "K167",
                ("data", name),
                f"no step uses data {name!r}",
                "data that a step names",
                "remove it",
                at_key=True,
            )
