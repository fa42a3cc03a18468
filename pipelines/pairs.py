"""`python -m pipelines.pairs`: the command of pipelines/cache/pairs.py."""

from pipelines.cache.pairs import main

if __name__ == "__main__":
    main()
