"""A run in a process of its own that does not import everything again: forked from one that has.

It is what `python recipes/NAME.py FLAGS` does, or `python recipes/train.py --method NAME --teacher digits FLAGS` for
a row of the digits, a few seconds sooner.
"""

import importlib
import multiprocessing
import os
import tempfile

PIPELINES = (
    "consistency_models stable_diffusion stable_diffusion_xl sana pixart_alpha stable_diffusion_3 flux wan qwenimage"
)
MODELS = "clip.modeling_clip t5.modeling_t5 umt5.modeling_umt5 gemma2.modeling_gemma2 qwen2_5_vl.modeling_qwen2_5_vl"
SLOW = [
    *"torch torch.distributed accelerate.utils peft sklearn.datasets scipy.stats tyro pipelines.run".split(),
    *"diffusers.models.unets.unet_2d diffusers.models.unets.unet_2d_condition diffusers.loaders.lora_pipeline".split(),
    *(f"diffusers.pipelines.{name}" for name in PIPELINES.split()),
    *(f"transformers.models.{name}" for name in MODELS.split()),
]


def _work(recipe, flags, said, environment):
    os.environ |= environment
    file = os.open(said, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(file, stream)
    from recipes import train
    from recipes.digits import TABLE

    if recipe in TABLE:
        train.main(["--method", recipe, "--teacher", "digits", *flags])
    else:
        module = importlib.import_module(f"recipes.{recipe}")
        module.main(module.CONFIG, flags)


def main(recipe, flags, environment=None):
    """The last words of the run if it failed, else nothing; environment: variables that it finds set."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SLOW)
    with tempfile.NamedTemporaryFile() as said:
        process = context.Process(target=_work, args=(recipe, flags, said.name, environment or {}))
        process.start()
        process.join()
        return said.read().decode()[-3000:] or f"status {process.exitcode}" if process.exitcode else ""
