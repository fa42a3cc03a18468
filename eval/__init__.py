"""Evaluation as its own stage: it knows folders of images and `pipelines.load`, never a distillation method.

generate (pipeline -> folder of images)  ->  score (folder -> numbers)  ->  report (numbers -> table and page)
"""
