"""`python -m eval.generate`: the command of eval/sampling/image_set.py."""

from eval.sampling.image_set import main

if __name__ == "__main__":
    main()
