"""`python -m eval.generate`: the command of eval/sampling/generate.py."""

from eval.sampling.generate import main

if __name__ == "__main__":
    main()
