"""The model that all servers here serve, and a plugin by which tests slow down and spoil what they do."""

import pytest
import serving_world

PLUGIN = '''
"""A plugin of the tests: slow corrections, weights that vanish or cannot be read for a while, and vLLM's
resolver of folders before all others, for a folder of its own."""
import functools, os, shutil, time
from pathlib import Path


def install():
    here = Path(os.environ["TEST_FOLDER"])
    from csulora.serving.guard import Guard
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.plugins.lora_resolvers.filesystem_resolver import FilesystemResolver

    class First(FilesystemResolver):
        async def resolve_lora(self, base_model_name, lora_name):
            if os.path.basename(lora_name) != lora_name:  # which vLLM's own lets leave its folder
                return None
            return await super().resolve_lora(base_model_name, lora_name)

    first, resolve = First(str(here / "first")), OpenAIServingModels.resolve_lora

    @functools.wraps(resolve)
    async def resolve_by_first(self, lora_name):
        if self.lora_resolvers[:1] != [first]:
            self.lora_resolvers.insert(0, first)
        return await resolve(self, lora_name)

    OpenAIServingModels.resolve_lora = resolve_by_first
    admit, again = Guard.admit, Guard.again

    @functools.wraps(admit)
    def slow_admit(self, folder, name, **options):
        if str(folder).endswith("-slow"):
            (here / "slow-begins").touch()
            time.sleep(4)
            (here / "slow-ends").touch()
        return admit(self, folder, name, **options)

    @functools.wraps(again)
    def spoiled_again(self, path, name):
        for line in (here / "remove").read_text().splitlines() if (here / "remove").exists() else ():
            shutil.rmtree(line, ignore_errors=True)
        if (here / "unreadable").exists():
            raise OSError(5, "Input/output error")
        return again(self, path, name)

    Guard.admit, Guard.again = slow_admit, spoiled_again
'''


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Folder with `base`, `aligned` (which is served) and `subspace.safetensors`."""
    return serving_world.build_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def plugin(tmp_path_factory):
    """A folder for PYTHONPATH with the tests' own vLLM plugin; TEST_FOLDER tells it where to look."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "slow_and_spoiled.py").write_text(PLUGIN)
    described = folder / "slow_and_spoiled-1.dist-info"
    described.mkdir()
    (described / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: slow-and-spoiled\nVersion: 1\n"
    )
    (described / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nslow = slow_and_spoiled:install\n"
    )
    return folder
