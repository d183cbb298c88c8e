"""Defer imports of packages that a library imports when it is loaded, but needs only for tasks that are not at hand."""

import contextlib
import importlib
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


@contextlib.contextmanager
def deferred_import(packages: Sequence[str]) -> Iterator[None]:
    """Within the block, `import` of a package in `packages`, or of a module in it, returns a placeholder.

    packages: dotted names; those that are loaded already, or are not installed, are unaffected. A name that is imported
    from a placeholder stands for the real one, which is imported at its first use after the block. Within the block, a
    decorator is the identity, and the result of another call is such a name too. No object is an instance of a name
    whose package was not imported. After the block, `import` returns the real packages.
    """
    finder = _Finder([name for name in packages if name not in sys.modules])
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        finder.is_active = False
        for name in [name for name, module in sys.modules.items() if type(module) is _Placeholder]:
            module, (parent, _, child) = sys.modules.pop(name), name.rpartition(".")
            if parent in sys.modules and vars(sys.modules[parent]).get(child) is module:
                delattr(sys.modules[parent], child)


class _Finder(MetaPathFinder, Loader):
    """Finds placeholders for installed packages."""

    def __init__(self, packages):
        self.packages, self.is_active = packages, True

    def find_spec(self, name, path=None, target=None):
        if name in self.packages:
            return ModuleSpec(name, self, is_package=True) if PathFinder.find_spec(name, path) else None
        is_inside = any(name.startswith(f"{package}.") for package in self.packages)
        return ModuleSpec(name, self, is_package=True) if is_inside else None

    def create_module(self, spec):
        return _Placeholder(spec.name)

    def exec_module(self, module):
        module.__dict__["finder"] = self


class _Placeholder(ModuleType):
    """A module whose names are created when they are asked for."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        finder = self.__dict__["finder"]
        if not finder.is_active:
            return getattr(importlib.import_module(self.__name__), name)
        self.__dict__[name] = _Name(name, (), {"_origin": (self.__name__, name, finder)})
        return self.__dict__[name]


class _Name(type):
    """A name imported from a placeholder. It is a class, so that it can stand in annotations and be a base class."""

    def _real(cls):
        parent, name, _ = cls._origin
        if isinstance(name, tuple):  # the result of a call
            args, kwargs = name
            return parent._real()(*args, **kwargs)
        return getattr(parent._real() if isinstance(parent, _Name) else importlib.import_module(parent), name)

    def __call__(cls, *args, **kwargs):
        finder = cls._origin[2]
        if not finder.is_active:
            return cls._real()(*args, **kwargs)
        if args and callable(args[0]):
            return args[0]  # a decorator
        if not args or args == (None,):
            return lambda function: function  # a decorator with options
        return _Name(cls.__name__, (), {"_origin": (cls, (args, kwargs), finder)})

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        finder = cls._origin[2]
        return _Name(name, (), {"_origin": (cls, name, finder)}) if finder.is_active else getattr(cls._real(), name)

    def __instancecheck__(cls, instance):
        parent, _, finder = cls._origin
        return not finder.is_active and parent in sys.modules and isinstance(instance, cls._real())

    def __or__(cls, other):
        return cls

    __ror__ = __or__
