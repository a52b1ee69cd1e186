"""Changes to Triton's interpreter, which runs kernels on the CPU: one for numpy, one for speed."""

import triton.language as tl
from triton.runtime import interpreter

_patch_language, _patch_tensor = interpreter._patch_lang, interpreter._patch_lang_tensor
_scopes, _patched = [], set()


class _AllScopes:
    """Undoes all changes to the modules of Triton's language."""

    def restore(self):
        while _scopes:
            _scopes.pop().restore()
        _patched.clear()


def _patch_language_once(function):
    """Let a function call the interpreter's operations.

    Triton 3.6 replaces all operations of its language again in each call of a nested function. This takes three
    quarters of the time.
    """
    modules = {id(value) for value in function.__globals__.values() if value is tl or value is tl.core}
    if not modules <= _patched:
        _patched.update(modules)
        _scopes.append(_patch_language(function))
    return _AllScopes()


def _patch_tensor_for_numpy(tensor, scope):
    """Let Python use a scalar as an integer. This fails in Triton 3.6 with numpy 2.4. Triton 3.8 has no such error."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def use_changes():
    """Use both changes until the process ends."""
    interpreter._patch_lang, interpreter._patch_lang_tensor = _patch_language_once, _patch_tensor_for_numpy
