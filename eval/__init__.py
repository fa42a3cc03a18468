"""Evaluation: generate (pipeline -> folder of images), score (folder -> figures), leaderboard (figures -> page).

It reads folders of images and calls `pipelines.load`. It never imports a distillation method.
"""
