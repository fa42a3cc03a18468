"""`python -m pipelines.control`: the command of pipelines/export/control_error.py. Model cards name `shown`."""

from pipelines.export.control_error import main
from pipelines.inference.controlnet import show_picture as shown

__all__ = ["shown"]

if __name__ == "__main__":
    main()
