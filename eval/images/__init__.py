"""Folders of images, and how they are resized."""
