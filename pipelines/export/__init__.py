"""Export of a student as a verified diffusers folder, with single files and a model card."""
