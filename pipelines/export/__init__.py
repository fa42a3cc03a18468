"""A student as a verified diffusers folder, with its single files and its card."""
