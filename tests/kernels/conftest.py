"""Triton's interpreter, for tests of the kernels where there is no GPU.

With a GPU Triton compiles, test_gpu.py runs the cases there, and the tests that need the interpreter
skip; TRITON_INTERPRET=1 in the environment turns that round.

Kernels run as they are compiled for a GPU: the interpreter is taught the products and roundings it lacks.
"""

import numpy as np
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
        _multiply_and_round_as_a_gpu_does(patch)
        # Else kernels upcast what the interpreter cannot multiply.
        patch.setattr("csulora_kernels.api.interpreted", lambda kernel: False)
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


def _multiply_and_round_as_a_gpu_does(patch):
    """Products of bfloat16, which the interpreter multiplies as integers; three TF32 products where a
    kernel asks for tf32x3; float32 rounded to bfloat16, not cut off."""
    import triton.language as tl
    from triton._C.libtriton import ir
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def create_dot(self, a, b, d, precision, imprecise):
        a, b = (single(self, X) for X in (a, b))
        if precision != ir.INPUT_PRECISION.TF32x3 or a.dtype.scalar != tl.float32:
            return dot(self, a, b, d, precision, imprecise)
        (a_high, a_low), (b_high, b_low) = (tf32_parts(X.data) for X in (a, b))
        small = np.matmul(a_low, b_high) + np.matmul(a_high, b_low)
        small = np.where(np.isnan(small), np.float32(0), small)  # of an infinity
        return TensorHandle(np.matmul(a_high, b_high) + small + d.data, d.dtype.scalar)

    def single(self, X):
        return cast(self, X, tl.float32) if X.dtype.scalar == tl.bfloat16 else X

    def cast_impl(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, src, dst_type)
        return TensorHandle(bfloat16_bits(src.data), dst_type.scalar)

    patch.setattr(InterpreterBuilder, "create_dot", create_dot)
    patch.setattr(InterpreterBuilder, "cast_impl", cast_impl)


def tf32_parts(x):
    """The two TF32 numbers that Triton splits a float32 into, rounded to nearest, ties away from zero."""

    def rounded(y):
        bits = (np.ascontiguousarray(y).view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
        return np.where(np.isfinite(y), bits.view(np.float32), y)

    high = rounded(x)
    with np.errstate(invalid="ignore"):
        return high, rounded(x - high)


def bfloat16_bits(x):
    """float32 as the bits of bfloat16, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)
