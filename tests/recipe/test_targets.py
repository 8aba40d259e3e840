import fnmatch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kroncc.errors import TargetError
from kroncc.recipe.names import ROLES
from kroncc.recipe.schema import Scope
from kroncc.recipe.targets import ModuleInfo, parse_target, select

LAYERS = 4


def bert(layers: int = LAYERS) -> list[ModuleInfo]:
    parts = [
        ("attention.self.query", "Linear", ("attention.q",)),
        ("attention.self.key", "Linear", ("attention.k",)),
        ("attention.self.value", "Linear", ("attention.v",)),
        ("attention.output.dense", "Linear", ("attention.out",)),
        ("attention.output.LayerNorm", "LayerNorm", ("norm",)),
        ("intermediate.dense", "Linear", ("ffn.up",)),
        ("output.dense", "Linear", ("ffn.down",)),
    ]
    found = [ModuleInfo("embeddings.word_embeddings", "Embedding", ("embedding.word",), None)]
    for layer in range(layers):
        found += [ModuleInfo(f"encoder.layer.{layer}.{n}", kind, roles, layer) for n, kind, roles in parts]
    return [
        *found,
        ModuleInfo("pooler.dense", "Linear", ("pooler",), None),
        ModuleInfo("classifier", "Linear", ("head",), None),
    ]


def chosen(*targets: str, exclude: tuple[str, ...] = (), count: int | None = None) -> list[str]:
    return select(Scope(targets=list(targets), exclude=list(exclude), count=count), bert())


def test_exact_name():
    assert chosen("classifier") == ["classifier"]


@pytest.mark.parametrize(
    ("target", "count"),
    [
        ("encoder.layer.*.output.dense", LAYERS),
        ("encoder.**.dense", 3 * LAYERS),
        ("**.dense", 3 * LAYERS + 1),
        ("**", 7 * LAYERS + 3),
        ("*", 1),
        ("encoder.layer.{0,3}.attention.self.{query,key}", 4),
        ("re:.*(query|key)", 2 * LAYERS),
        ("type:Linear", 6 * LAYERS + 2),
        ("type:*Norm", LAYERS),
        ("@attention.*", 4 * LAYERS),
        ("@attention", 4 * LAYERS),
        ("@attention.{q,k}", 2 * LAYERS),
        ("@ffn", 2 * LAYERS),
        ("@norm", LAYERS),
        ("@embedding.word", 1),
        ("@ffn.up[0:3]", 3),
        ("@ffn.up[::2]", 2),
        ("@ffn.up[3]", 1),
        ("@ffn.up[-1]", 1),
        ("@ffn.up[ 1 : ]", 3),
        ("type:Linear[0]", 6),
        ("encoder.**[1:3]", 14),
    ],
)
def test_forms(target: str, count: int):
    assert len(chosen(target)) == count


def test_double_star_also_means_no_segment():
    modules = [ModuleInfo("a.b", "Linear", (), None), ModuleInfo("a.x.y.b", "Linear", (), None)]
    assert select(Scope(targets=["a.**.b"]), modules) == ["a.b", "a.x.y.b"]


def test_last_layer_is_the_models_last():
    assert chosen("@ffn.up[-1]") == [f"encoder.layer.{LAYERS - 1}.intermediate.dense"]


def test_order_is_the_models_and_without_repeats():
    names = chosen("classifier", "@embedding.word", "type:Linear[0]", "@ffn.up[0]")
    assert names == [m.fqn for m in bert() if m.fqn in set(names)]
    assert len(names) == len(set(names)) == 8


def test_exclude_and_count():
    assert len(chosen("@attention.*", exclude=("@attention.*[0]",), count=12)) == 12


@pytest.mark.parametrize(
    ("target", "code"),
    [
        ("", "K201"),
        ("a" * 301, "K201"),
        ("a[b]", "K201"),
        ("@ffn.up[1:2:0]", "K201"),
        ("@ffn.up[1:2:3:4]", "K201"),
        ("a b", "K201"),
        ("a.{b", "K201"),
        ("a.{b,{c}}", "K201"),
        ("a.}b{", "K201"),
        ("*a" * 9, "K201"),
        ("@", "K202"),
        ("@attn.q", "K202"),
        ("@ffn.upp", "K202"),
        ("@ffn.*.x", "K202"),
        ("@attention.q-v", "K202"),
        ("re:(", "K203"),
        ("re:*", "K203"),
    ],
)
def test_bad_syntax(target: str, code: str):
    with pytest.raises(TargetError) as caught:
        parse_target(target)
    assert caught.value.problems[0].code == code
    assert caught.value.problems[0].expected


def test_unknown_role_names_the_nearest():
    with pytest.raises(TargetError, match=r"did you mean 'ffn\.up'"):
        parse_target("@ffn.upp")


def test_no_match_lists_roles_that_are_there():
    with pytest.raises(TargetError) as caught:
        chosen("@ffn.gate")
    problem = caught.value.problems[0]
    assert problem.code == "K204"
    assert "ffn.up (4)" in problem.expected
    assert "ffn.up" in problem.remedy or "valid" in problem.remedy


def test_no_match_lists_nearest_names():
    with pytest.raises(TargetError) as caught:
        chosen("encoder.layer.0.attention.self.quary")
    assert "encoder.layer.0.attention.self.query" in caught.value.problems[0].remedy


def test_no_match_of_a_layer_says_which_there_are():
    with pytest.raises(TargetError, match=r"layers among 0, 1, 2, 3"):
        chosen("@ffn.up[7]")


def test_no_match_in_a_type():
    with pytest.raises(TargetError, match=r"did you mean 'Linear'"):
        chosen("type:Linaer")


def test_exclude_without_match():
    with pytest.raises(TargetError) as caught:
        chosen("@ffn.up", exclude=("encoder.layers.0.**",))
    assert caught.value.problems[0].code == "K205"


def test_count_not_met():
    with pytest.raises(TargetError) as caught:
        chosen("@ffn.up", count=12)
    problem = caught.value.problems[0]
    assert problem.code == "K206"
    assert "match 4 modules" in problem.message
    assert "encoder.layer.0.intermediate.dense" in problem.message
    assert problem.expected == "12 (count)"


@pytest.mark.parametrize("scope", [Scope(), Scope(targets=["@head"], exclude=["classifier"])])
def test_nothing_left(scope: Scope):
    with pytest.raises(TargetError) as caught:
        select(scope, bert())
    assert caught.value.problems[0].code == "K207"


bound = st.none() | st.integers(-9, 9)


@given(st.integers(1, 8), bound, bound, st.none() | st.integers(-4, 4).filter(bool))
def test_slices_agree_with_python(layers: int, start: int | None, stop: int | None, step: int | None):
    text = f"@ffn.up[{'' if start is None else start}:{'' if stop is None else stop}"
    text += "]" if step is None else f":{step}]"
    wanted = sorted(range(layers)[start:stop:step])
    modules = bert(layers)
    if not wanted:
        with pytest.raises(TargetError):
            select(Scope(targets=[text]), modules)
        return
    assert select(Scope(targets=[text]), modules) == [f"encoder.layer.{n}.intermediate.dense" for n in wanted]


segment = st.text("ab_1", min_size=1, max_size=3)
names = st.lists(segment, min_size=1, max_size=4).map(".".join)


@given(names, st.text("ab_1*.", min_size=1, max_size=8).filter(lambda text: "**" not in text))
def test_single_stars_agree_with_fnmatch_by_segment(name: str, glob: str):
    parts, patterns = name.split("."), glob.split(".")
    wanted = len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))
    found = parse_target(glob).matches(ModuleInfo(name, "X", (), None), 0)
    assert found == wanted


@given(names)
def test_a_name_matches_itself_and_nothing_longer(name: str):
    target = parse_target(name)
    assert target.matches(ModuleInfo(name, "X", (), None), 0)
    assert not target.matches(ModuleInfo(name + ".a", "X", (), None), 0)


@given(st.text(max_size=40))
def test_any_text_parses_or_is_refused(text: str):
    try:
        target = parse_target(text)
    except TargetError:
        return
    target.matches(ModuleInfo("a.b", "Linear", ROLES, 0), 1)
