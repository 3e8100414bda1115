"""The hooks held against the text of a vLLM that is not installed: its wheel, which VLLM_WHEEL names."""

import ast
import os
import zipfile
from pathlib import Path

import pytest

from csulora.integrations.hooks import Hook

HERE = Path(__file__).parents[2] / "csulora" / "integrations" / "vllm"
WHEEL = os.environ.get("VLLM_WHEEL", "")
pytestmark = pytest.mark.skipif(not WHEEL, reason="VLLM_WHEEL names no wheel of vLLM")


@pytest.fixture(scope="module")
def module():
    """The tree of a module of the wheel by its name."""
    with zipfile.ZipFile(WHEEL) as wheel:
        names = set(wheel.namelist())

        def read(name):
            path = name.replace(".", "/")
            (file,) = {f"{path}.py", f"{path}/__init__.py"} & names
            return ast.parse(wheel.read(file))

        yield read


def defined(module, place, name):
    """The function of a module, perhaps in a class of it, or imported from another."""
    tree = module(place)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            return defined(module, node.module, name)
    for part in name.split("."):
        found = [x for x in ast.walk(tree) if getattr(x, "name", None) == part]
        assert found, f"{place} has no {name}"
        tree = found[0]
    return tree


def names(tree):
    """Every name that a module defines, imports or sets."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif getattr(node, "name", None):
            yield node.name


def hooks():
    """Every hook in a function of vLLM that the modules here define."""
    for file in sorted(HERE.glob("*.py")):
        tree = ast.parse(file.read_text())
        values = {}
        for node in tree.body:
            if isinstance(node, ast.Assign):
                code = compile(ast.Expression(node.value), file.name, "eval")
                try:
                    values[node.targets[0].id] = eval(code, {"Hook": Hook}, values)
                except NameError:  # needs more than what hooks are made of
                    continue
        for value in values.values():
            found = value if isinstance(value, list) else [value]
            yield from (x for x in found if isinstance(x, Hook) and x.module.startswith("vllm."))


def test_each_hooked_function_takes_what_it_is_taken_for(module):
    found = list(hooks())
    assert len(found) == 12
    for hook in found:
        function = defined(module, hook.module, hook.name)
        given = function.args
        parameters = [x.arg for x in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
        parameters += [x.arg for x in (given.vararg, given.kwarg) if x]
        wanted = list(hook.parameters)
        assert set(wanted) <= set(parameters) if hook.among else wanted == parameters, hook
        assert isinstance(function, ast.AsyncFunctionDef) == hook.waits, hook


# What else the hooks touch, by the module that has it.
TOUCHED = {
    "vllm.entrypoints.openai.models.serving": ["lora_resolvers", "lora_requests", "engine_client"],
    "vllm.entrypoints.serve": ["create_error_response"],
    "vllm.exceptions": ["VLLMUnprocessableEntityError", "VLLMValidationError"],
    "vllm.lora.request": ["lora_name", "lora_int_id", "lora_path", "load_inplace"],
    "vllm.lora.resolver": ["LoRAResolver", "resolve_lora"],
    "vllm.lora.worker_manager": ["embedding_modules", "_adapter_manager", "remove_adapter"],
    "vllm.v1.engine.async_llm": ["vllm_config"],
    "vllm.v1.engine.input_processor": ["lora_config"],
    "vllm.v1.engine": ["cache_salt", "lora_request"],
    "vllm.ray.ray_env": ["VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"],
}


@pytest.mark.parametrize("name", TOUCHED)
def test_each_thing_that_the_hooks_touch_is_there(name, module):
    assert set(TOUCHED[name]) <= set(names(module(name)))
