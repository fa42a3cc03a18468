"""From a folder of images to features on disk."""
