"""From a pipeline to a folder of images."""
