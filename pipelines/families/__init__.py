"""One module for each family of diffusers pipelines that can be a teacher."""
