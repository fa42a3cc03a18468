"""`python -m pipelines.experts`: the command of pipelines/inference/experts.py, with the name that model cards give."""

from pipelines.inference.experts import install, main

__all__ = ["install"]

if __name__ == "__main__":
    main()
