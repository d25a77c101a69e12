"""Register the methods of gated.py wherever mergekit is imported with this folder on PYTHONPATH."""

from importlib import import_module

import _mergekit_monosoup_autoload as hook

_register = hook.TARGETS["mergekit.merge_methods"]


def _register_all(module):
    _register(module)
    import_module("gated")


hook.TARGETS["mergekit.merge_methods"] = _register_all
