"""The hook that registers this package's merge methods, whoever imports mergekit.

mergekit knows a method once `register(method)` has run in the process, and it looks for no plugins.
So a startup file (`mergekit_monosoup_autoload.pth`; Python >= 3.15: `.start`) calls
:func:`install`, which puts a finder on `sys.meta_path`; the finder lets the import system import a
target as ever and acts right after. With the environment variable MERGEKIT_MONOSOUP_AUTOLOAD=0
nothing of this happens. `import mergekit_monosoup` calls :func:`install` too, for installs whose
startup files Python does not run (`pip install --target`).

Every Python process of the environment runs this file. So it lies beside the package, not in it,
imports nothing that the interpreter has not loaded already (that is why annotations are quoted and
`typing` is absent), and no failure of ours may become a failure of theirs.
"""

import _thread
import os
import sys

TYPE_CHECKING = False  # type checkers take any variable of this name for True
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

SWITCH = "MERGEKIT_MONOSOUP_AUTOLOAD"
METHODS_MODULE = "mergekit_monosoup.methods"
BUFFERS_MODULE = "mergekit_monosoup.buffers"
PLANNER_MODULE = "mergekit_monosoup.planner"
ENDING_MODULE = "mergekit_monosoup.ending"
NAMES = ("monosoup", "svc")  # of the methods that METHODS_MODULE registers

_lock = _thread.allocate_lock()


def install() -> None:
    """Put the finder in place, and act on targets that are already imported.

    Calling it again does no harm.
    """
    if _switched_off():
        return
    # Never held during an import: a thread in an import may call install(), and importlib cannot
    # resolve that deadlock.
    with _lock:
        # By name: if this module was dropped and imported anew, the class is another, and one
        # finder is enough.
        finder = next(
            (f for f in sys.meta_path if type(f).__name__ == MonosoupFinder.__name__), None
        )
        present = finder is not None
        if finder is None:
            finder = MonosoupFinder()
            sys.meta_path.insert(0, finder)
    for name in TARGETS:
        module = sys.modules.get(name)
        # A target in the middle of its import is acted on at its end, if the finder was there when
        # it began.
        if module is not None and not (present and _initialising(name)):
            finder.act(name, module)  # type: ignore[attr-defined]


class MonosoupFinder:
    """A finder that asks the other finders for the targets and has their loaders report back.

    It finds nothing itself. It stays on `sys.meta_path` after the first import: mergekit may be
    reloaded, or dropped and imported anew.
    """

    def __init__(self) -> None:
        self.warned: "set[str]" = set()
        self.searching: "set[tuple[int, str]]" = set()

    def find_spec(
        self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if name not in TARGETS or _switched_off():
            return None
        # Another tool's finder may ask all finders in turn, like this one: without the guard, the
        # two recurse for ever.
        search = (_thread.get_ident(), name)
        if search in self.searching:
            return None
        self.searching.add(search)
        try:
            spec = self._ask_the_others(name, path, target)
        finally:
            self.searching.discard(search)
        # No exec_module: a namespace package, or a loader of the time before Python 3.4. Nothing to
        # hold on to.
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _ReportingLoader(spec.loader, self)  # type: ignore[assignment]
        return spec

    def _ask_the_others(
        self, name: str, path: "Sequence[str] | None", target: "ModuleType | None"
    ) -> "ModuleSpec | None":
        for finder in list(sys.meta_path):
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    return spec
        return None

    def act(self, name: str, module: "ModuleType") -> None:
        """Do what the target was waited for.

        A failure is one log record per target and process, never an exception: not even a
        SystemExit, which some packages raise where they cannot work. What the user's own program
        raises meanwhile, by Ctrl-C or from a signal handler, is left alone.
        """
        try:
            TARGETS[name](module)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            if _from_a_signal(error):
                raise
            # Another thread is importing our methods and importlib chose this one to break the
            # deadlock. The import over there goes on and registers at its end.
            if _initialising(METHODS_MODULE) or name in self.warned:
                return
            self.warned.add(name)
            try:  # noqa: SIM105 - contextlib would be one more import in every start of Python
                _warn(name, error)
            except Exception:  # of a log handler of the program's own
                pass


class _ReportingLoader:
    """A stand-in for a module's loader, which reports that the module has been executed.

    It gives the module its own loader back before that.
    """

    real: "Any" = None  # a copy made without __init__ would look it up in __getattr__ for ever

    def __init__(self, real: "Any", finder: MonosoupFinder) -> None:
        self.real = real
        self.finder = finder

    # get_source, is_package, ... for whoever only looks at the spec.
    def __getattr__(self, name: str) -> "Any":
        return getattr(self.real, name)

    def create_module(self, spec: "ModuleSpec") -> "ModuleType | None":
        return self.real.create_module(spec)

    def exec_module(self, module: "ModuleType") -> None:
        # Restored before, not after: the module's own code and its later users (pkgutil, inspect,
        # importlib.resources) are to see the loader they would see without us.
        spec = module.__spec__
        if spec is not None:
            spec.loader = self.real
        if getattr(module, "__loader__", None) is self:
            module.__loader__ = self.real
        # The comment on the next line is for whoever reads it in a traceback.
        self.real.exec_module(module)  # what fails below fails without mergekit-monosoup too
        self.finder.act(module.__name__, module)


def _from_a_signal(error: BaseException) -> bool:
    """Return whether an exception comes out of a signal handler of the program.

    Such as the SystemExit by which many end themselves on SIGTERM.
    """
    import signal

    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    codes = [code for handler in handlers if (code := getattr(handler, "__code__", None))]
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code in codes:
            return True
        trace = trace.tb_next
    return False


def _warn(name: str, error: BaseException) -> None:
    """Log that a target could not be hooked into, in one line."""
    # Not `warnings`: under `python -W error` a warning would break the import of mergekit.
    import logging

    module, lost = MISSED[name]
    logging.getLogger("mergekit_monosoup").warning(
        "mergekit-monosoup could not hook into %s: %s: %s. mergekit itself is unaffected, but %s. "
        "See the whole error with `python -c 'import %s'`, check versions with `pip check`, or "
        "turn this off with %s=0.",
        name,
        type(error).__name__,
        " ".join(str(error).split()),  # in one line
        lost,
        module,
        SWITCH,
    )


def _register_methods(merge_methods: "ModuleType") -> None:
    """Import the module that registers our methods."""
    if _initialising(METHODS_MODULE):
        # `import mergekit_monosoup.methods` is what imports mergekit here, or another thread does:
        # it registers at its end. Waiting for it would be a deadlock.
        return
    # Looked up, not remembered: mergekit may have been dropped from sys.modules and imported anew,
    # with an empty registry. Then methods.py is executed anew as well, for it holds on to the
    # classes of the mergekit that is gone.
    if METHODS_MODULE in sys.modules and all(
        method.spec.name not in NAMES for method in merge_methods.registered_methods()
    ):
        del sys.modules[METHODS_MODULE]
    __import__(METHODS_MODULE)  # registers at its end


def _allow_in_evolve(genome: "ModuleType") -> None:
    """Add our methods to the table of those that mergekit-evolve accepts.

    Its values are the parameters that mergekit-evolve searches over.
    """
    for name in NAMES:
        genome.METHOD_PARAM_MAPS.setdefault(name, ["weight"])


def _keep_buffers(task_adapter: "ModuleType") -> None:
    """Have tensors that are not floating point kept as fine-tuned, where our methods merge."""
    __import__(BUFFERS_MODULE)
    sys.modules[BUFFERS_MODULE].keep(task_adapter)


def _watch_plans(_: "ModuleType") -> None:
    """Have plans compared with the models' files, for the tensors that mergekit passes by."""
    __import__(PLANNER_MODULE)
    sys.modules[PLANNER_MODULE].watch()


def _watch_flat_plans(script: "ModuleType") -> None:
    """Likewise of mergekit-pytorch, which plans by itself."""
    __import__(PLANNER_MODULE)
    sys.modules[PLANNER_MODULE].watch_flat(script)


def _watch_files(tasks: "ModuleType") -> None:
    """Have merges by our methods say what they did, when their files are closed."""
    __import__(ENDING_MODULE)
    sys.modules[ENDING_MODULE].watch_files(tasks)


def _watch_merges(merge: "ModuleType") -> None:
    """Have them say it when all of the model is there."""
    __import__(ENDING_MODULE)
    sys.modules[ENDING_MODULE].watch_merges(merge)


TARGETS: "dict[str, Callable[[ModuleType], None]]" = {
    "mergekit.merge_methods": _register_methods,
    "mergekit.plan": _watch_plans,
    "mergekit.scripts.merge_raw_pytorch": _watch_flat_plans,
    "mergekit.io.tasks": _watch_files,
    "mergekit.merge": _watch_merges,
    "mergekit.evo.genome": _allow_in_evolve,
    "mergekit.merge_methods.task_adapter": _keep_buffers,
}
# Target → the module that is to act on it, and what is missed where it cannot.
MISSED = {
    "mergekit.merge_methods": (METHODS_MODULE, f"does not know the methods {', '.join(NAMES)}"),
    "mergekit.plan": (PLANNER_MODULE, "nobody says what a merge leaves out"),
    "mergekit.scripts.merge_raw_pytorch": (PLANNER_MODULE, "nobody says which filters match none"),
    "mergekit.io.tasks": (ENDING_MODULE, "nobody says what a merge did"),
    "mergekit.merge": (ENDING_MODULE, "what a merge did is said before it is complete"),
    "mergekit.evo.genome": (METHODS_MODULE, f"mergekit-evolve refuses {', '.join(NAMES)}"),
    "mergekit.merge_methods.task_adapter": (
        BUFFERS_MODULE,
        "it stops at tensors that are not floating point and differ",
    ),
}


def _switched_off() -> bool:
    """Return whether the user has switched the hook off."""
    return os.environ.get(SWITCH, "").strip().lower() in ("0", "false", "no", "off")


def _initialising(name: str) -> bool:
    """Return whether the module's code is being executed, in this thread or another."""
    return getattr(getattr(sys.modules.get(name), "__spec__", None), "_initializing", False)
