"""Triton's interpreter, for tests of the kernels where there is no GPU.

With a GPU Triton compiles, test_gpu.py runs the cases there, and the tests that need the interpreter
skip; TRITON_INTERPRET=1 in the environment turns that round.
"""

import pytest


@pytest.fixture(scope="session")
def interpreter():
    """For tests that run kernels on the CPU."""
    triton = pytest.importorskip("triton")
    from triton.runtime.interpreter import InterpretedFunction

    if not triton.knobs.runtime.interpret:
        pytest.skip("Triton compiles here; with TRITON_INTERPRET=1 it interprets")
    # Half of it would compile. Not a skip, which would hide every test of the kernels.
    early = not isinstance(triton.language.sum, InterpretedFunction)
    assert not early, "Triton was imported before tests/conftest.py"
    with pytest.MonkeyPatch.context() as patch:
        _prepare_once_a_launch(patch)
        yield


def _prepare_once_a_launch(patch):
    """Save a third of the time: the interpreter replaces the functions of triton.language by its own
    again at every call of a function inside of a kernel, though they still are its own."""
    import triton.language as tl
    from triton.runtime import interpreter

    replace, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    replaced = set()

    def replace_once(function):
        languages = {id(tl), id(tl.core)} & {id(X) for X in function.__globals__.values()}
        if languages <= replaced:
            return None
        replaced.update(languages)
        return replace(function)

    def launch_anew(self, *arguments, **options):
        replaced.clear()
        return launch(self, *arguments, **options)

    patch.setattr(interpreter, "_patch_lang", replace_once)
    patch.setattr(interpreter.GridExecutor, "__call__", launch_anew)
