"""A world of captioned shapes, which is drawn by rule and checked by rule.

A compositional toy: without files, a latent codec worth the name or a pretrained text encoder. It compares methods of
distillation on prompts; it says nothing about products.

scenes: attributes, captions, splits, drawing. checker: what an image shows, and whether its caption asks for it.
"""

from eval.world.scenes import WORLDS, World, load_world

__all__ = ["WORLDS", "World", "load_world"]
