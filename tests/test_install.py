"""The built wheel, installed: an unmodified mergekit finds the method, and nothing else notices.

Each check is a process of a virtual environment that holds the wheel, started in an empty folder,
so that neither the checkout nor its editable install can answer in the wheel's place. torch,
mergekit and the rest are borrowed from the running environment by a line in a .pth file; Python
does not read the .pth files of a folder added that way.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import checkpoints

import mergekit_monosoup

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
HOOK = "_mergekit_monosoup_autoload/__init__.py"
PTH = "mergekit_monosoup_autoload.pth"
START = "mergekit_monosoup_autoload.start"
# --ignore-installed: a regular install in the running environment would count as "already
# satisfied".
OFFLINE = ("--no-index", "--no-deps", "--ignore-installed")
SWITCHED_OFF = {"MERGEKIT_MONOSOUP_AUTOLOAD": "0"}
Pair = tuple[Path, Path]  # pretrained and fine-tuned
TIMEOUT = 300  # seconds; a deadlock must fail the test, not hang the suite


# -- environments ----------------------------------------------------------------------------------


@dataclass
class Environment:
    """A virtual environment, and an empty folder to run it in."""

    folder: Path
    workdir: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def site(self) -> Path:
        (site,) = (self.folder / "lib").glob("python*/site-packages")
        return site

    def run(
        self, *arguments: object, fails: bool | None = False, **variables: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run Python. ``fails``: whether it should fail; None: the caller will judge."""
        # Without the variables that change what Python imports or switch the hook.
        kept = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("PYTHON", "MERGEKIT_", "COV_", "PIP_TARGET"))
        }
        kept["HF_HUB_OFFLINE"] = "1"
        done = subprocess.run(
            [str(self.python), *map(str, arguments)],
            cwd=self.workdir,
            env={**kept, **variables},
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
        assert fails in (None, done.returncode != 0), (
            f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
        return done

    def code(self, source: str, *flags: str, **variables: Any) -> Any:
        """Run source that prints JSON as its last line; return that."""
        done = self.run(*flags, "-c", textwrap.dedent(source), **variables)
        return json.loads(done.stdout.splitlines()[-1])

    def pip(self, *arguments: object) -> None:
        self.run("-m", "pip", "--quiet", "--disable-pip-version-check", *arguments)

    def files(self) -> set[str]:
        """Return all files in site-packages and bin.

        The bytecode of other packages is left out: it appears as they run.
        """
        places = [path for folder in (self.site, self.python.parent) for path in folder.rglob("*")]
        return {
            str(path)
            for path in places
            if "monosoup" in path.name or "__pycache__" not in path.parts
        }


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as a release is: the sdist, and the wheel from the sdist."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)],
        check=True,
        timeout=TIMEOUT,
        stdout=subprocess.DEVNULL,
    )
    (built,) = out.glob("*.whl")
    return built


def create(folder: Path, borrow: bool = True) -> Environment:
    # pip is borrowed as well where there is one, for installing it takes five seconds.
    options = ["--without-pip"] if find_spec("pip") or not borrow else []
    subprocess.run(
        [sys.executable, "-m", "venv", *options, str(folder / "env")], check=True, timeout=TIMEOUT
    )
    (folder / "workdir").mkdir()
    environment = Environment(folder / "env", folder / "workdir")
    if borrow:
        lenders = [
            path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")
        ]
        (environment.site / "borrowed.pth").write_text("\n".join(lenders) + "\n")
    return environment


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with the wheel."""
    environment = create(tmp_path_factory.mktemp("installed"))
    environment.pip("install", *OFFLINE, wheel)
    home = environment.code(
        "import json, mergekit_monosoup as m; print(json.dumps([m.__file__, m.__version__]))"
    )
    assert home == [
        str(environment.site / "mergekit_monosoup" / "__init__.py"),
        mergekit_monosoup.__version__,
    ]
    return environment


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment without it. Whoever installs here uninstalls."""
    return create(tmp_path_factory.mktemp("bare"))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    base, (tuned,) = checkpoints.pair(tmp_path_factory.mktemp("models"))
    return base, tuned


def config(models: Pair, file: Path, suffix: str = "") -> Path:
    base, tuned = (f"{folder}{suffix}" for folder in models)
    file.write_text(
        yaml.safe_dump(
            {"merge_method": "monosoup", "base_model": base, "models": [{"model": tuned}]}
        )
    )
    return file


def script(name: str) -> Path:
    """Return a console script of the running environment, unmodified.

    In `python SCRIPT` the shebang line is a comment.
    """
    path = Path(sys.executable).parent / name
    assert path.is_file(), f"{path} is missing: is mergekit installed in the running environment?"
    return path


def assert_edited(out: Path, models: Pair) -> None:
    W0, W1, W = (checkpoints.state_dict(folder) for folder in (*models, out))
    assert W.keys() == W1.keys()
    matrices = [name for name in W if W[name].ndim == 2]
    assert len(matrices) > 10
    for name in W:
        if name in matrices:
            assert not torch.equal(W[name], W1[name]) and not torch.equal(W[name], W0[name]), name
        else:
            assert torch.equal(W[name], W1[name]), name


# -- what is shipped -------------------------------------------------------------------------------


def test_wheel_contents(wheel: Path) -> None:
    info = f"mergekit_monosoup-{mergekit_monosoup.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        text = {name: archive.read(name).decode() for name in names if not name.endswith("/")}
    assert {name.split("/")[0] for name in names} == {
        "mergekit_monosoup",
        "_mergekit_monosoup_autoload",
        info,
        PTH,
        START,
    }
    assert {name for name in names if name.startswith("_mergekit_monosoup_autoload/")} == {HOOK}
    # Templates and scripts of pages among them.
    files = [path for path in (ROOT / "mergekit_monosoup").rglob("*") if path.is_file()]
    sources = {str(p.relative_to(ROOT)) for p in files if "__pycache__" not in p.parts}
    assert {name for name in names if name.startswith("mergekit_monosoup/")} == sources
    assert text[PTH] == (ROOT / "_mergekit_monosoup_autoload" / PTH).read_text()
    assert text[START] == "_mergekit_monosoup_autoload:install\n"
    assert text[HOOK] == (ROOT / HOOK).read_text()
    recorded = {line.rsplit(",", 2)[0] for line in text[f"{info}/RECORD"].splitlines()}
    assert recorded == names  # what is not recorded stays behind on uninstall
    metadata = text[f"{info}/METADATA"]
    assert (
        "License-Expression: Apache-2.0" in metadata
        and "Requires-Dist: mergekit<0.2,>=0.1.5" in metadata
    )
    assert "TERMS AND CONDITIONS" in text[f"{info}/licenses/LICENSE"]
    assert "mergekit-monosoup = mergekit_monosoup.cli:main" in text[f"{info}/entry_points.txt"]


def test_the_hook_runs_first_in_no_ones_way() -> None:
    # Startup files run in sorted order; ours comes after those that put editable installs on the
    # path.
    assert sorted([PTH, "__editable__.any-1.0.pth", "_mergekit_monosoup.pth"])[-1] == PTH


# -- the start of Python ---------------------------------------------------------------------------

SHOW_START = """
import json, sys
ours = [f for f in sys.meta_path if type(f).__name__ == "MonosoupFinder"]
finders = [type(finder).__module__ for finder in ours]
print(json.dumps([finders, sorted(sys.modules)]))
"""


@pytest.mark.parametrize("flags", [[], ["-I"], ["-E", "-s"], ["-W", "error"]], ids=" ".join)
def test_start_imports_only_the_hook(installed: Environment, flags: list[str]) -> None:
    done = installed.run(*flags, "-c", SHOW_START)
    finders, modules = json.loads(done.stdout)
    assert finders == ["_mergekit_monosoup_autoload"]
    assert done.stderr == ""
    assert not {"torch", "mergekit", "mergekit_monosoup"} & set(modules)
    # json, for printing, is imported by both; the difference to a start without the package is the
    # hook's own module.
    without = json.loads(installed.run(*flags, "-S", "-c", SHOW_START).stdout)[1]
    assert not {"logging", "threading", "typing", "importlib.util"} & (set(modules) - set(without))


def test_the_switch(installed: Environment) -> None:
    on, off = installed.code(SHOW_START), installed.code(SHOW_START, **SWITCHED_OFF)
    assert off[0] == []
    assert off[1] == on[1]  # so the hook imports nothing that Python had not
    source = """
        import json, mergekit.merge_methods as m
        before = [x.spec.name for x in m.registered_methods()]
        # Importing the package is no order to hook in either; importing its methods is.
        import mergekit_monosoup
        between = [x.spec.name for x in m.registered_methods()]
        import mergekit_monosoup.methods
        registered = ["monosoup" in names for names in (before, between)]
        print(json.dumps([registered, m.get("monosoup").spec.name]))
    """
    assert installed.code(source, **SWITCHED_OFF) == [[False, False], "monosoup"]


def test_startup_twice_makes_one_finder(installed: Environment) -> None:
    again = """
import site, sys
site.main()
import mergekit_monosoup
for name in ("mergekit_monosoup", "_mergekit_monosoup_autoload"): del sys.modules[name]
import mergekit_monosoup
"""
    finders, _ = installed.code(again + SHOW_START)
    assert finders == ["_mergekit_monosoup_autoload"]


def test_start_file_of_python_3_15(installed: Environment) -> None:
    entry = (installed.site / START).read_text().strip()
    source = f"import pkgutil; pkgutil.resolve_name({entry!r})()\n" + SHOW_START
    assert installed.code(source)[0] == ["_mergekit_monosoup_autoload"]


def test_without_mergekit_python_starts_and_the_package_imports(
    wheel: Path, bare: Environment, tmp_path: Path
) -> None:
    alone = create(tmp_path, borrow=False)
    bare.pip("install", *OFFLINE, "--target", alone.site, wheel)
    done = alone.run(
        "-c",
        "import mergekit_monosoup; print(mergekit_monosoup.__version__); import mergekit",
        fails=True,
    )
    assert done.stdout.strip() == mergekit_monosoup.__version__
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'mergekit'"
    assert alone.run("-c", "pass").stderr == ""


# -- mergekit, unmodified --------------------------------------------------------------------------


@dataclass
class Run:
    done: subprocess.CompletedProcess[str]
    out: Path


@pytest.fixture(scope="module")
def runs(
    installed: Environment, models: Pair, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Run]:
    """Run the slow processes, two at a time.

    Importing torch, transformers and peft takes each of them seconds.
    """
    folder = tmp_path_factory.mktemp("runs")
    yml = config(models, folder / "monosoup.yml")
    raw = config(models, folder / "raw.yml", suffix="/model.safetensors")
    stages = folder / "stages.yml"
    halves = [{"model": model, "parameters": {"weight": 1}} for model in ("edited", str(models[1]))]
    second = yaml.safe_dump({"merge_method": "linear", "models": halves})
    stages.write_text(f"name: edited\n{yml.read_text()}---\n{second}")
    out = {name: folder / name for name in ("yaml", "isolated", "multi", "pytorch", "api")}
    commands: dict[str, list[object]] = {
        "yaml": [script("mergekit-yaml"), yml, out["yaml"]],
        "isolated": ["-I", "-m", "mergekit.scripts.run_yaml", yml, out["isolated"]],
        "multi": [
            "-E",
            "-s",
            script("mergekit-multi"),
            stages,
            "--out-path",
            out["multi"],
            "-I",
            folder / "between",
        ],
        "pytorch": [script("mergekit-pytorch"), raw, out["pytorch"]],
        "api": ["-c", API, yml, out["api"]],
    }
    with ThreadPoolExecutor(2) as pool:
        ends = {
            name: pool.submit(installed.run, *command, fails=None)
            for name, command in commands.items()
        }
    return {name: Run(end.result(), out[name]) for name, end in ends.items()}


@pytest.mark.parametrize("command", ["yaml", "isolated", "pytorch"])
def test_command(runs: dict[str, Run], models: Pair, command: str) -> None:
    assert runs[command].done.returncode == 0, runs[command].done.stderr
    assert_edited(runs[command].out, models)


def test_two_stages(runs: dict[str, Run], models: Pair) -> None:
    assert runs["multi"].done.returncode == 0, runs["multi"].done.stderr
    between = runs["multi"].out.parent / "between" / "edited"
    assert_edited(between, models)
    edited, tuned, final = (
        checkpoints.state_dict(folder) for folder in (between, models[1], runs["multi"].out)
    )
    for name in final:
        torch.testing.assert_close(final[name], (edited[name] + tuned[name]) / 2)


# What Python code meets, in the order in which it would first meet it.
API = """
import json, sys
# The first import of mergekit, past the package's own names.
from mergekit.merge_methods.registry import get
facts = {"registry": get("monosoup").spec.name}

import mergekit.merge_methods as merge_methods
loaders = merge_methods.__spec__.loader, merge_methods.__loader__
facts["loaders"] = [type(loader).__name__ for loader in loaders]

import torch
torch.manual_seed(0)
base, tuned = torch.randn(24, 16), torch.randn(24, 16)
merged = merge_methods.merge_tensors([base, tuned], "monosoup", base_index=0)
size = (base - tuned).norm()
facts["merge_tensors"] = [float((merged - w).norm() / size) for w in (base, tuned)]

from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
import yaml
config, out = sys.argv[1:]
configuration = MergeConfiguration.model_validate(yaml.safe_load(open(config)))
run_merge(configuration, out, MergeOptions(quiet=True))

from mergekit.evo.genome import METHOD_PARAM_MAPS, ModelGenomeDefinition
from mergekit_monosoup.methods import MERGE_METHODS
names = [method.spec.name for method in MERGE_METHODS]
facts["evolve"] = {name: METHOD_PARAM_MAPS.get(name) for name in names}
genome = ModelGenomeDefinition(models=["a"], merge_method="monosoup", base_model="b")
facts["genome"] = genome.merge_method

import importlib
importlib.reload(merge_methods)
facts["reloaded"] = merge_methods.get("monosoup").spec.name
for name in [name for name in sys.modules if name.split(".")[0] == "mergekit"]:
    del sys.modules[name]
import mergekit.merge_methods as anew
facts["anew"] = [anew is not merge_methods, isinstance(anew.get("monosoup"), anew.MergeMethod)]

import mergekit_monosoup
facts["home"] = mergekit_monosoup.__file__
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def facts(runs: dict[str, Run]) -> dict[str, Any]:
    done = runs["api"].done
    assert done.returncode == 0, done.stderr
    printed: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return printed


def test_registry_imported_directly(facts: dict[str, Any]) -> None:
    assert facts["registry"] == "monosoup"


def test_it_is_the_wheel_that_answers(facts: dict[str, Any], installed: Environment) -> None:
    assert Path(facts["home"]).parent.parent == installed.site


def test_no_trace_in_the_module(facts: dict[str, Any], runs: dict[str, Run]) -> None:
    assert facts["loaders"] == ["SourceFileLoader"] * 2
    assert not ours(runs["api"].done.stderr)


def test_merge_tensors(facts: dict[str, Any]) -> None:
    from_base, from_tuned = facts["merge_tensors"]
    assert from_base > 0.1 and from_tuned > 0.01


def test_run_merge(facts: dict[str, Any], runs: dict[str, Run], models: Pair) -> None:
    assert_edited(runs["api"].out, models)


def test_evolve_accepts_the_method(facts: dict[str, Any]) -> None:
    assert facts["evolve"] == {
        "monosoup": ["weight"],
        "svc": ["weight"],
    }  # every method, under its own name
    assert facts["genome"] == "monosoup"


def test_mergekit_reloaded_or_imported_anew(facts: dict[str, Any]) -> None:
    assert facts["reloaded"] == "monosoup" and facts["anew"] == [True, True]


WORKER = """
def method():
    import os
    from mergekit.merge_methods import get
    return [os.getpid(), get("monosoup").spec.name]
"""


def test_spawned_process(installed: Environment) -> None:
    (installed.workdir / "worker.py").write_text(WORKER)
    main = installed.workdir / "spawn.py"
    main.write_text(
        "import json, multiprocessing, os, worker\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(json.dumps([os.getpid(), *pool.apply(worker.method)]))\n"
    )
    parent, child, name = json.loads(installed.run(main).stdout)
    assert parent != child and name == "monosoup"


def test_ray_worker(installed: Environment) -> None:
    pytest.importorskip(
        "ray", reason="ray has no wheel for this Python, or the extra `test` is not installed"
    )
    source = """
        import json, os, ray
        ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)
        print(json.dumps([os.getpid(), *ray.get(ray.remote(method).remote())]))
    """
    parent, child, name = installed.code(
        WORKER + textwrap.dedent(source),
        RAY_USAGE_STATS_ENABLED="0",
        RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
    )
    assert parent != child and name == "monosoup"


# -- when something is wrong -----------------------------------------------------------------------


def write(folder: Path, modules: dict[str, str]) -> str:
    """Write modules by dotted name, each package with an __init__.py.

    Returns the folder, for PYTHONPATH.
    """
    for name, source in modules.items():
        path = folder.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        for parent in path.relative_to(folder).parents[:-1]:
            (folder / parent / "__init__.py").touch()
        path.write_text(textwrap.dedent(source))
    return str(folder)


def ours(stderr: str) -> list[str]:
    """Return log records of ours, printed bare; a traceback's lines are indented."""
    return [
        line
        for line in stderr.splitlines()
        if line.startswith("mergekit") and "mergekit-monosoup" in line
    ]


def test_a_method_of_mergekit_itself_wins(installed: Environment, tmp_path: Path) -> None:
    home = Path(str(distribution("mergekit").locate_file("mergekit")))
    shutil.copytree(home, tmp_path / "mergekit", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "mergekit" / "merge_methods" / "__init__.py").open("a") as file:
        file.write(
            "\nregister(GeneralizedTaskArithmeticMerge("
            "consensus_method=None, sparsification_method=None,"
            "default_normalize=False, default_rescale=False,"
            "method_name='monosoup', method_pretty_name='Theirs', method_reference_url=None))\n"
        )
    source = "import mergekit.merge_methods as m; print(m.get('monosoup').spec.pretty_name)"
    done = installed.run("-c", source, PYTHONPATH=str(tmp_path))
    assert done.stdout.strip() == "Theirs"
    assert len(ours(done.stderr)) == 1 and "already has a merge method 'monosoup'" in done.stderr


def test_broken_methods_leave_mergekit_working(installed: Environment, tmp_path: Path) -> None:
    broken = write(tmp_path, {"mergekit_monosoup.methods": "raise OSError('the disk is on fire')"})
    source = """
        import torch, mergekit.merge_methods as m
        tensors = [torch.zeros(2), torch.ones(2)]
        merged = m.merge_tensors(tensors, "linear", parameters={"weight": 0.5})
        print(merged.tolist())
    """
    done = installed.run("-c", textwrap.dedent(source), PYTHONPATH=broken)
    assert json.loads(done.stdout) == [0.5, 0.5]
    (warning,) = ours(done.stderr)
    assert "OSError: the disk is on fire" in warning and "MERGEKIT_MONOSOUP_AUTOLOAD=0" in warning


# Stands in for mergekit where only the import system is at issue, at a hundredth of the time.
FAKE_MERGEKIT = {
    "mergekit.merge_methods.registry": """
        from types import SimpleNamespace
        names = []
        def registered_methods():
            return [SimpleNamespace(spec=SimpleNamespace(name=name)) for name in names]
    """,
    "mergekit.merge_methods.__init__": """
        from mergekit.merge_methods.registry import names, registered_methods
    """,
}
FAKE_METHODS = {
    "mergekit_monosoup.__init__": """
        import _mergekit_monosoup_autoload
        _mergekit_monosoup_autoload.install()
    """,
    "mergekit_monosoup.methods": """
        from mergekit.merge_methods import names
        names.append('monosoup')
    """,
}


@pytest.mark.parametrize("entangled", [False, True], ids=["", "mergekit imports the package"])
@pytest.mark.parametrize(
    "first",
    [
        "mergekit.merge_methods",
        "mergekit.merge_methods.registry",
        "mergekit_monosoup",
        "mergekit_monosoup.methods",
    ],
)
def test_registered_once_whatever_comes_first(
    installed: Environment, tmp_path: Path, first: str, entangled: bool
) -> None:
    fake = {**FAKE_MERGEKIT, **FAKE_METHODS}
    if entangled:  # half-way through its own import
        rest = textwrap.dedent(fake["mergekit.merge_methods.__init__"])
        fake["mergekit.merge_methods.__init__"] = "import mergekit_monosoup\n" + rest
    source = (
        f"import {first}, mergekit.merge_methods as m, mergekit_monosoup.methods; print(*m.names)"
    )
    done = installed.run("-c", source, PYTHONPATH=write(tmp_path, fake))
    assert (done.stdout.split(), done.stderr) == (["monosoup"], "")


def test_one_warning_however_often(installed: Environment, tmp_path: Path) -> None:
    """Also under -W error, where a warning would become an exception in mergekit's import."""
    fake = write(tmp_path, {**FAKE_MERGEKIT, "mergekit_monosoup.methods": "1 / 0"})
    source = """
        import importlib, _mergekit_monosoup_autoload
        import mergekit.merge_methods
        importlib.reload(mergekit.merge_methods)
        _mergekit_monosoup_autoload.install()
    """
    done = installed.run("-W", "error", "-c", textwrap.dedent(source), PYTHONPATH=fake)
    assert len(ours(done.stderr)) == 1 and "ZeroDivisionError" in done.stderr


def test_an_older_mergekit(installed: Environment, tmp_path: Path) -> None:
    """Such as 0.1.4, whose registry has neither register() nor registered_methods()."""
    fake = write(tmp_path, {**FAKE_MERGEKIT, "mergekit.evo.genome": ""})
    source = "import mergekit.merge_methods, mergekit.evo.genome; print('survived')"
    done = installed.run("-c", source, PYTHONPATH=fake)
    assert done.stdout.strip() == "survived"
    first, second = ours(done.stderr)
    assert "into mergekit.merge_methods: ModuleNotFoundError" in first and "pip check" in first
    assert "into mergekit.evo.genome: AttributeError" in second


def test_mergekit_that_fails_to_import_fails_as_ever(
    installed: Environment, tmp_path: Path
) -> None:
    fake = write(tmp_path, {"mergekit.merge_methods.__init__": "raise KeyError('theirs')"})
    done = installed.run("-c", "import mergekit.merge_methods", fails=True, PYTHONPATH=fake)
    assert done.stderr.splitlines()[-1] == "KeyError: 'theirs'" and not ours(done.stderr)
    assert "fails without mergekit-monosoup too" in done.stderr  # beside the one frame of ours


@pytest.mark.parametrize("place", [0, 1], ids=["before ours", "after ours"])
def test_another_finder_that_asks_all_finders(
    installed: Environment, tmp_path: Path, place: int
) -> None:
    source = """
        import json, sys
        class Other:
            calls = 0
            def find_spec(self, name, path=None, target=None):
                if name == "mergekit.merge_methods":
                    Other.calls += 1
                    others = [f for f in sys.meta_path if f is not self]
                    specs = (f.find_spec(name, path, target) for f in others)
                    return next(filter(None, specs), None)
        sys.meta_path.insert(int(sys.argv[1]), Other())
        from mergekit.merge_methods import names
        print(json.dumps([names, Other.calls > 0]))
    """
    fake = write(tmp_path, {**FAKE_MERGEKIT, **FAKE_METHODS})
    done = installed.run("-c", textwrap.dedent(source), place, PYTHONPATH=fake)
    assert json.loads(done.stdout) == [["monosoup"], True]


def test_two_threads(installed: Environment, tmp_path: Path) -> None:
    """One imports mergekit, which imports our methods; the other our package or its methods.

    Those import mergekit. A grid of starting times, so that each meets the other before, in and
    after each of its imports.
    """
    slow = "import time; time.sleep(0.01)\n"
    modules = {
        name: textwrap.dedent(source) for name, source in {**FAKE_MERGEKIT, **FAKE_METHODS}.items()
    }
    fake = write(tmp_path, {name: f"{slow}{source}\n{slow}" for name, source in modules.items()})
    source = """
        import itertools, json, sys, threading, time
        def load(delay, name):
            time.sleep(delay)
            try:
                exec(f"import {name}")
            except BaseException as error:
                wrong.append([name, repr(error)])
        wrong = []
        delays = [0, 0.005, 0.015, 0.03]
        names = ["mergekit_monosoup", "mergekit_monosoup.methods"]
        for theirs, ours, name, hooked in itertools.product(delays, delays, names, [True, False]):
            if not hooked:  # as in an install whose startup files do not run
                finders = [f for f in sys.meta_path if type(f).__name__ != "MonosoupFinder"]
                sys.meta_path[:] = finders
            packages = "mergekit", "mergekit_monosoup"
            for module in [m for m in sys.modules if m.split(".")[0] in packages]:
                del sys.modules[module]
            pairs = (theirs, "mergekit.merge_methods"), (ours, name)
            threads = [threading.Thread(target=load, args=p, daemon=True) for p in pairs]
            for thread in threads: thread.start()
            for thread in threads: thread.join(20)
            if any(thread.is_alive() for thread in threads):
                sys.exit(f"deadlock at {theirs}, {ours}, {name}, {hooked}")
            registered = sys.modules["mergekit.merge_methods"].names
            if registered != ["monosoup"]:
                wrong.append([theirs, ours, name, hooked, registered])
        print(json.dumps(wrong))
    """
    done = installed.run("-c", textwrap.dedent(source), PYTHONPATH=fake)
    assert json.loads(done.stdout) == []
    assert done.stderr == ""


# -- other ways to install -------------------------------------------------------------------------

HOME = """
import json, sys, mergekit.merge_methods as m
registered = "monosoup" in [method.spec.name for method in m.registered_methods()]
print(json.dumps(sys.modules["mergekit_monosoup"].__file__ if registered else None))
"""


# As much without importing mergekit, which takes seconds: the hook is in place, and our package is
# found. That mergekit gets the methods then, `runs` and `facts` show.
LOOK = """
import json, sys
from importlib.util import find_spec
hooked = any(type(finder).__name__ == "MonosoupFinder" for finder in sys.meta_path)
print(json.dumps(find_spec("mergekit_monosoup").origin if hooked else None))
"""


def round_trip(
    environment: Environment,
    install: Callable[[], object],
    uninstall: Callable[[], object],
    look: str = LOOK,
) -> Path:
    """Install, look, and uninstall; then every file is as before.

    Returns the folder that the methods came from.
    """
    before = environment.files()
    install()
    try:
        home = environment.code(look)
        new = environment.files() - before
        expected = {environment.site / name for name in (HOOK, PTH, START)}
        expected.add(environment.python.parent / "mergekit-monosoup")
        assert expected <= set(map(Path, new))
    finally:
        uninstall()
    assert environment.files() == before
    return Path(home).parent


def test_uninstall_leaves_nothing(bare: Environment, wheel: Path) -> None:
    home = round_trip(
        bare,
        lambda: bare.pip("install", *OFFLINE, wheel),
        lambda: bare.pip("uninstall", "--yes", "mergekit-monosoup"),
    )
    assert home == bare.site / "mergekit_monosoup"


def test_editable_install(bare: Environment) -> None:
    home = round_trip(
        bare,
        lambda: bare.pip("install", *OFFLINE, "--no-build-isolation", "--editable", ROOT),
        lambda: bare.pip("uninstall", "--yes", "mergekit-monosoup"),
        HOME,  # found through a finder of its own kind
    )
    assert home == ROOT / "mergekit_monosoup"


def uv(environment: Environment, *arguments: object) -> None:
    options = ("--offline", "--python", environment.python)
    command = [sys.executable, "-m", "uv", "pip", *map(str, (*arguments, *options))]
    subprocess.run(command, check=True, timeout=TIMEOUT)


def test_uv_install(bare: Environment, wheel: Path) -> None:
    home = round_trip(
        bare,
        lambda: uv(bare, "install", "--no-deps", wheel),
        lambda: uv(bare, "uninstall", "mergekit-monosoup"),
    )
    assert home == bare.site / "mergekit_monosoup"


def test_pip_target_needs_an_import(bare: Environment, wheel: Path, tmp_path: Path) -> None:
    """Python runs no startup files there.

    The first half also shows that mergekit knows nothing by itself.
    """
    bare.pip("install", *OFFLINE, "--target", tmp_path / "target", wheel)
    source = HOME + "import mergekit_monosoup; print(m.get('monosoup').spec.name)"
    done = bare.run("-c", source, PYTHONPATH=str(tmp_path / "target"))
    assert done.stdout.split() == ["null", "monosoup"]


def test_own_command(installed: Environment) -> None:
    done = installed.run(installed.python.parent / "mergekit-monosoup", "--version")
    assert mergekit_monosoup.__version__ in done.stdout


# -- over an older version -------------------------------------------------------------------------

# Modules of a wheel from before the package had folders; each would shadow, or be shadowed by, what
# is now a folder, or is gone.
FLAT_MODULES = (
    "check",
    "distributed/driver",
    "distributed/fingerprint",
    "eigen",
    "layout",
    "monosoup",
    "pair",
    "report",
    "spectrum",
    "stack",
    "svc",
    "weight",
)
STALE = "raise ImportError('a module of the old version')\n"


@pytest.fixture(scope="session")
def old_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a lower version with flat modules, none of which can be imported."""
    info = "mergekit_monosoup-0.0.1.dist-info"
    files = {f"mergekit_monosoup/{name}.py": STALE for name in FLAT_MODULES}
    files |= {
        "mergekit_monosoup/__init__.py": STALE,
        "mergekit_monosoup/distributed/__init__.py": STALE,
        "_mergekit_monosoup_autoload.py": STALE,
        PTH: "# no hook: it would fail in every start of Python, also in the installer's\n",
        START: "\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: mergekit-monosoup\nVersion: 0.0.1\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = f"{info}/RECORD"
    files[record] = "".join(f"{name},,\n" for name in [*files, record])
    path = tmp_path_factory.mktemp("old") / "mergekit_monosoup-0.0.1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def installed_sources(folder: Path) -> set[str]:
    """Return the sources of ours in a folder of packages."""
    paths = [path for path in folder.rglob("*.py") if "mergekit_monosoup" in str(path)]
    return {str(path.relative_to(folder)) for path in paths}


def sources_of(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if name.endswith(".py")}


@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_an_upgrade_leaves_nothing_of_the_old_version(
    wheel: Path, old_wheel: Path, tmp_path: Path, installer: str
) -> None:
    environment = create(tmp_path)

    def install(path: Path) -> None:
        if installer == "uv":
            uv(environment, "install", "--no-deps", "--upgrade", path)
        else:
            environment.pip("install", "--no-index", "--no-deps", "--upgrade", path)

    install(old_wheel)
    assert installed_sources(environment.site) == sources_of(old_wheel)
    assert not sources_of(old_wheel) <= sources_of(wheel)
    install(wheel)
    assert installed_sources(environment.site) == sources_of(wheel)
    assert not [path for path in environment.files() if "0.0.1" in path]
    home = environment.code(HOME if installer == "pip" else LOOK)
    assert Path(home).parent == environment.site / "mergekit_monosoup"


def test_an_upgrade_in_a_target_folder(
    bare: Environment, wheel: Path, old_wheel: Path, tmp_path: Path
) -> None:
    """pip uninstalls nothing there: what the new version does not replace stays."""
    target = tmp_path / "target"
    bare.pip("install", *OFFLINE, "--target", target, old_wheel)
    assert installed_sources(target) == sources_of(old_wheel)
    bare.pip("install", *OFFLINE, "--target", target, "--upgrade", wheel)
    stale = target / "_mergekit_monosoup_autoload.py"
    assert installed_sources(target) - {stale.name} == sources_of(wheel)
    # The one file that may stay stands beside a folder of its name, which Python prefers.
    stale.write_text(STALE)
    source = """
        import json, mergekit_monosoup, _mergekit_monosoup_autoload as hook
        import mergekit.merge_methods as m
        print(json.dumps([hook.__file__, m.get("monosoup").spec.name]))
    """
    home = bare.code(source, PYTHONPATH=str(target))
    assert home == [str(target / HOOK), "monosoup"]
