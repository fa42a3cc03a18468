"""`python -m pipelines.control`: the command of pipelines/inference/controlnet.py."""

from pipelines.inference.controlnet import main

if __name__ == "__main__":
    main()
