"""`python -m eval.features`: the command of eval/features/extraction.py."""

from eval.features.extraction import main

if __name__ == "__main__":
    main()
