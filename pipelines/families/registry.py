"""Which family reads which pipeline class of diffusers."""

FAMILIES = {  # _class_name of model_index.json -> module of this package
    "ConsistencyModelPipeline": "edm",
    "StableDiffusionPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
    "PixArtAlphaPipeline": "pixart",
    "PixArtSigmaPipeline": "pixart",
    "SanaPipeline": "sana",
    "SanaSprintPipeline": "sana",
    "QwenImagePipeline": "qwen",
    "WanPipeline": "wan",
}

EDM_NETS = ("pipelines.edm_nets", "distill.pipelines.edm_nets")  # names of that module in a checkout and in the wheel
