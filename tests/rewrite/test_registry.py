import importlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from kroncc.errors import PassError
from kroncc.rewrite import registry, schema_cache

ROOT = Path(__file__).parents[2]
MODULE = '''
from typing import ClassVar
from torch import nn
from kroncc.rewrite.base import SitePass

class {name}(SitePass):
    """Do {kind} to a module."""
    kind: ClassVar[str] = "{kind}"
    factor: int = 2

    def replace(self, site):
        return nn.Identity()
'''


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A directory on sys.path where distributions with entry points can be put, and a cache of its own."""
    packages = tmp_path / "site"
    packages.mkdir()
    monkeypatch.syspath_prepend(str(packages))
    monkeypatch.setenv("KRONCC_CACHE", str(tmp_path / "cache"))
    _forget()
    yield packages
    _forget()
    for name in [name for name in sys.modules if name.startswith("plug_")]:
        del sys.modules[name]


def _forget() -> None:
    importlib.invalidate_caches()
    registry._entry_points.cache_clear()
    registry._table.cache_clear()


def install(
    site: Path, dist: str, entry: str, code: str, version: str = "1.0", editable: bool = False
) -> None:
    """Lay out an installed distribution as pip does: metadata, entry points, one module."""
    info = site / f"{dist.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[kroncc.passes]\n{entry}\n")
    if editable:
        (info / "direct_url.json").write_text(
            json.dumps({"url": "file:///x", "dir_info": {"editable": True}})
        )
    module = entry.split("=")[1].split(":")[0].strip()
    (site / f"{module}.py").write_text(code)
    _forget()


def caught(call) -> PassError:
    with pytest.raises(PassError) as error:
        call()
    return error.value


def test_built_in_passes_come_by_entry_point():
    assert registry.pass_names()["kronecker"].owner == "kroncc"


def test_a_table_and_a_class(site: Path):
    install(site, "plug-a", "a = plug_a:PASSES", 'PASSES = {"halve": "plug_a_code:Halve"}')
    (site / "plug_a_code.py").write_text(MODULE.format(name="Halve", kind="halve"))
    install(site, "plug-b", "third = plug_b:Third", MODULE.format(name="Third", kind="third"))
    names = registry.pass_names()
    assert {"kronecker", "halve", "third"} <= set(names)
    assert names["halve"] == registry.Entry("halve", "plug-a", "plug_a_code:Halve")
    assert registry.get_pass("halve").__name__ == "Halve"
    assert registry.get_pass("third")(factor=3).factor == 3
    assert registry.pass_schema("third")["properties"]["factor"]["default"] == 2


def test_names_are_found_without_importing_the_pass(site: Path):
    install(site, "plug-a", "a = plug_a:PASSES", 'PASSES = {"halve": "plug_a_code:Halve"}')
    assert "halve" in registry.pass_names()
    assert "plug_a_code" not in sys.modules


def test_unknown_pass_names_the_nearest():
    error = caught(lambda: registry.get_pass("kroneker"))
    assert error.problems[0].code == "K410"
    assert "'kronecker'" in error.problems[0].remedy


def test_clash_names_both_owners(site: Path):
    install(site, "plug-a", "a = plug_a:PASSES", 'PASSES = {"halve": "plug_a:Halve"}')
    install(site, "plug-b", "b = plug_b:PASSES", 'PASSES = {"halve": "plug_b:Halve"}')
    for call in (registry.pass_names, lambda: registry.get_pass("halve")):
        error = caught(call)
        assert error.problems[0].code == "K411"
        assert "plug-a" in str(error)
        assert "plug-b" in str(error)


@pytest.mark.parametrize(
    "code",
    [
        "import nothing_of_this_name",
        "1 / 0",
        "not Python",
        "PASSES = 3",
        "PASSES = {'a': 'no colon'}",
        "x = 1",
        "raise SystemError",
    ],
)
def test_a_plugin_that_fails_is_named_only_when_it_matters(site: Path, code: str):
    install(site, "plug-bad", "bad = plug_bad:PASSES", code)
    assert registry.get_pass("kronecker")
    assert registry.pass_schema("kronecker")
    for call in (registry.pass_names, lambda: registry.get_pass("unheard-of")):
        error = caught(call)
        assert error.problems[0].code == "K412"
        assert "plug-bad" in str(error)
        assert error.__cause__ is not None


@pytest.mark.parametrize("code", ["import nothing_of_this_name", "x = 1", "raise OSError('gone')"])
def test_a_pass_that_fails_to_load(site: Path, code: str):
    install(site, "plug-a", "a = plug_a:PASSES", 'PASSES = {"halve": "plug_code:Halve"}')
    (site / "plug_code.py").write_text(code)
    assert registry.pass_schema("kronecker")
    assert "halve" in registry.pass_names()
    for call in (lambda: registry.get_pass("halve"), lambda: registry.pass_schema("halve")):
        error = caught(call)
        assert error.problems[0].code == "K412"
        assert "plug-a" in str(error)
        assert error.__cause__ is not None


def test_what_is_no_pass(site: Path):
    install(site, "plug-a", "a = plug_a:PASSES", 'class No: pass\nPASSES = {"no": "plug_a:No"}')
    assert caught(lambda: registry.get_pass("no")).problems[0].code == "K413"


def test_a_name_that_differs_from_kind(site: Path):
    code = MODULE.format(name="Halve", kind="halve") + '\nPASSES = {"half": "plug_a:Halve"}'
    install(site, "plug-a", "a = plug_a:PASSES", code)
    error = caught(lambda: registry.get_pass("half"))
    assert error.problems[0].code == "K413"
    assert "'halve'" in str(error)


def test_schemas_are_cached_and_read_back(site: Path, tmp_path: Path):
    fresh = registry.schemas()
    schema = fresh.schema("kronecker")
    (file,) = (tmp_path / "cache").iterdir()
    assert json.loads(file.read_text())["passes"]["kronecker"] == schema
    stored = json.loads(file.read_text())
    stored["passes"]["kronecker"]["description"] = "from the cache"
    file.write_text(json.dumps(stored))
    assert registry.pass_schema("kronecker")["description"] == "from the cache"


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", '{"key": "other", "passes": {}}', '{"passes": 3}', "\x00", "[" * 100_000]
)
def test_a_corrupt_cache_is_replaced(site: Path, tmp_path: Path, content: str):
    registry.pass_schema("kronecker")
    (file,) = (tmp_path / "cache").iterdir()
    file.write_text(content)
    assert registry.pass_schema("kronecker")["properties"]
    assert json.loads(file.read_text())["passes"]["kronecker"]


def test_a_cache_that_cannot_be_written_costs_only_time(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("KRONCC_CACHE", str(tmp_path / "file" / "below"))
    assert registry.pass_schema("kronecker")["properties"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_cache(site: Path, tmp_path: Path):
    (tmp_path / "cache").mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
    assert registry.pass_schema("kronecker")["properties"]


def test_the_key_follows_versions_and_editable_sources(site: Path):
    keys = [schema_cache.key(registry._entry_points())]
    install(site, "plug-a", "a = plug_a:PASSES", "PASSES = {}")
    keys.append(schema_cache.key(registry._entry_points()))
    install(site, "plug-b", "b = plug_b:PASSES", "PASSES = {}", editable=True)
    keys.append(schema_cache.key(registry._entry_points()))
    (site / "plug_b.py").write_text("PASSES = {}  # edited")
    keys.append(schema_cache.key(registry._entry_points()))
    (site / "plug_a.py").write_text("PASSES = {}  # not editable: the version speaks for it")
    keys.append(schema_cache.key(registry._entry_points()))
    assert len(set(keys[:4])) == 4
    assert keys[4] == keys[3]


def test_the_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("KRONCC_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert schema_cache.directory() == tmp_path / "kroncc"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert schema_cache.directory() == Path.home() / ".cache" / "kroncc"


def test_the_registry_imports_no_torch(tmp_path: Path):
    code = "import sys, kroncc.rewrite.registry as r; r.pass_names(); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.strip() == "False"
